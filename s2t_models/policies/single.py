"""One model decoding by itself: greedy, sample, llm, llm-sample, kd, distil, tsd-kd, and any other checkpoint. It never
triggers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import ClassVar

from s2t_models.hosting import Hosting
from s2t_models.policies.base import (
    CORE,
    GREEDY,
    Engines,
    Event,
    Needs,
    Policy,
    Request,
    Source,
    one_draft,
    sampling,
)
from s2t_models.settings import SamplerSettings

#: Objectives whose checkpoints are systems of the comparison: they are known by name, whether they are served or not.
TRAINED = ("kd", "distil", "tsd-kd")


@dataclass(frozen=True)
class SingleModel(Policy):
    """Decode with the engine named `engine`, drawing tokens as `sampler` says."""

    name: str
    engine: str = "slm"
    sampler: SamplerSettings = GREEDY
    takes_penalties: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {self.engine: CORE}

    @property
    def scored_by(self) -> str:  # type: ignore[override]
        return self.engine

    def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        engine = engines[self.engine]
        asked = sampling(self.sampler, request, request.max_tokens, support=request.support)
        source: Source = "teacher" if self.engine == "teacher" else "slm"
        return one_draft(request, self.engine, source, lambda tell: engine.generate(request.prompt, asked, tell))


def names(hosting: Hosting) -> list[str]:
    return ["greedy", "sample", "llm", "llm-sample", *dict.fromkeys([*TRAINED, *hosting.recipe.checkpoints])]


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
    return SingleModel(name, name) if name in TRAINED or name in hosting.recipe.checkpoints else None
