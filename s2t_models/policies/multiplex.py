"""Multiplex Thinking, training-free: each input is the mean embedding of several draws; the first draw is the text.

It runs inside an engine that takes embeddings as inputs; this file only names its settings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from s2t_models.engines.contract import Draft, Sampling, Tell
from s2t_models.hosting import Hosting
from s2t_models.policies.base import Engines, Event, Needs, Policy, Request, one_draft, sampling
from s2t_models.settings import MultiplexSettings, SamplerSettings


@runtime_checkable
class MultiplexEngine(Protocol):
    """Capability "multiplex"."""

    async def generate_multiplex(
        self, prefix: list[int], sampling: Sampling, settings: MultiplexSettings, tell: Tell | None = None
    ) -> Draft: ...


@dataclass(frozen=True)
class MultiplexThinking(Policy):
    """One `generate_multiplex` call; `sampler` draws tokens after the early stop."""

    name: str
    settings: MultiplexSettings
    sampler: SamplerSettings

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {"slm": frozenset({"multiplex"})}

    def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        slm = engines["slm"]
        assert isinstance(slm, MultiplexEngine)
        asked = sampling(self.sampler, request, request.max_tokens)
        return one_draft(
            request, "slm", "slm", lambda tell: slm.generate_multiplex(request.prompt, asked, self.settings, tell)
        )


def names(hosting: Hosting) -> list[str]:
    return ["multiplex"]


def build(name: str, hosting: Hosting) -> Policy | None:
    settings = hosting.recipe.policies
    return MultiplexThinking(name, settings.multiplex, settings.sample) if name == "multiplex" else None
