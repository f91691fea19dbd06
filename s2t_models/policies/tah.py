"""Think-at-Hard: the SLM thinks once more about the tokens that its decider finds hard.

It runs inside an engine that can run second passes, beside the SLM whose first pass it is; this file only names its
settings. A decision for each hard token says what the second pass made of the first one's likeliest next tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from s2t_models.engines.contract import Draft, Sampling, Tell
from s2t_models.hosting import Hosting
from s2t_models.policies.base import Engines, Event, Needs, Policy, Request, one_draft, sampling
from s2t_models.policies.errors import PolicyError
from s2t_models.settings import TahSettings


@runtime_checkable
class SecondPassEngine(Protocol):
    """Capability "second_pass"."""

    async def generate_thinking(
        self, prefix: list[int], sampling: Sampling, settings: TahSettings, tell: Tell | None = None
    ) -> Draft:
        """Decode with a second pass of every token that is harder than `settings.threshold`."""
        ...


@dataclass(frozen=True)
class ThinkAtHard(Policy):
    """One `generate_thinking` call."""

    name: str
    settings: TahSettings

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {"slm": frozenset({"second_pass"})}

    def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        slm = engines["slm"]
        assert isinstance(slm, SecondPassEngine)
        asked = sampling(self.settings.sampler, request, request.max_tokens)
        return one_draft(
            request, "slm", "slm", lambda tell: slm.generate_thinking(request.prompt, asked, self.settings, tell)
        )


def names(hosting: Hosting) -> list[str]:
    return ["tah"]


def build(name: str, hosting: Hosting) -> Policy | None:
    if name != "tah":
        return None
    if hosting.slm.second_pass is None:
        raise PolicyError("tah: the recipe names no second pass as tah; `s2t distil --objective tah` trains one")
    return ThinkAtHard(name, hosting.recipe.policies.tah)
