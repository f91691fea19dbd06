"""R2R: a router on the SLM's own outputs decides which of its tokens the teacher replaces.

It is Takeover with another trigger. The router runs beside the SLM, on its device; it reads the whole draft in one SLM
forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from s2t_models.engines.contract import Capability, Routed
from s2t_models.hosting import Hosting
from s2t_models.policies.base import CORE, Engines, Needs, Policy
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.errors import PolicyError
from s2t_models.policies.scorers import TeacherScorer
from s2t_models.policies.triggers import Drafted, Judgement
from s2t_models.router import read_settings


@runtime_checkable
class RoutingEngine(Protocol):
    """Capability "route": an engine with R2R's router beside its model."""

    async def route(self, tokens: list[int], start: int) -> Routed:
        """The probability that each of tokens[start:] makes the text diverge."""
        ...


@runtime_checkable
class FeatureEngine(Protocol):
    """Capability "features": what the router reads, to train one."""

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        """For the steps whose tokens are tokens[start:]: [T, H + H + support] float32, the last hidden state, the
        embedding of the SLM's token and its top logits."""
        ...


@dataclass(frozen=True)
class RouterTrigger:
    """The router's probability of a divergent token at or above `threshold`."""

    threshold: float
    of_drafter: ClassVar[frozenset[Capability]] = CORE

    @property
    def needs(self) -> Needs:
        return {"slm": frozenset({"route"})}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        slm = engines["slm"]
        assert isinstance(slm, RoutingEngine)
        routed = await slm.route(drafted.prefix + drafted.ids, len(drafted.prefix) + drafted.first)
        values_T = routed.probabilities_T
        return Judgement(values_T, values_T >= self.threshold, usage={"slm": routed.usage})


def names(hosting: Hosting) -> list[str]:
    return ["r2r"]


def build(name: str, hosting: Hosting) -> Policy | None:
    if name != "r2r":
        return None
    folder = hosting.slm.router
    if folder is None:
        raise PolicyError(f"{name}: router.path is not set; `s2t distil --objective router` trains one")
    recipe = hosting.recipe
    return Collaborate(
        name,
        RouterTrigger(read_settings(folder).threshold),
        TeacherScorer("vocabulary"),
        recipe.candidates,
        recipe.divergence.support,
        recipe.policies.chunk,
    )
