"""One model decoding by itself: greedy, sample, llm, llm-sample, kd, and any other checkpoint. It never triggers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from s2t_models.hosting import Hosting
from s2t_models.policies.base import CORE, GREEDY, Done, Engines, Event, Needs, Policy, Request, Source, Span, sampling
from s2t_models.settings import SamplerSettings


@dataclass(frozen=True)
class SingleModel(Policy):
    """Decode with the engine named `engine`, drawing tokens as `sampler` says."""

    name: str
    engine: str = "slm"
    sampler: SamplerSettings = GREEDY

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {self.engine: CORE}

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        draft = await engines[self.engine].generate(request.prompt, sampling(self.sampler, request, request.max_tokens))
        source: Source = "teacher" if self.engine == "teacher" else "slm"
        yield Span(draft.ids, source)
        yield Done(draft.finish, {self.engine: draft.usage})


def names(hosting: Hosting) -> list[str]:
    return ["greedy", "sample", "llm", "llm-sample", *dict.fromkeys(["kd", *hosting.recipe.checkpoints])]


def build(name: str, hosting: Hosting) -> Policy | None:
    settings = hosting.recipe.policies
    match name:
        case "greedy":
            return SingleModel(name)
        case "sample":
            return SingleModel(name, "slm", settings.sample)
        case "llm":
            return SingleModel(name, "teacher")
        case "llm-sample":
            return SingleModel(name, "teacher", settings.llm_sample)
    return SingleModel(name, name) if name == "kd" or name in hosting.recipe.checkpoints else None
