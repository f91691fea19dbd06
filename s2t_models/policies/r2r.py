"""R2R: a router on the SLM's own outputs decides which of its tokens the teacher replaces.

It is Takeover with another trigger. The router runs beside the SLM, on its device; it reads the whole draft in one SLM
forward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np

from s2t_models.engines.contract import Capability, Routed
from s2t_models.hosting import Hosting, alongside
from s2t_models.policies.base import CORE, Engines, Needs, Policy
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.errors import PolicyError
from s2t_models.policies.scorers import TeacherScorer
from s2t_models.policies.triggers import Drafted, Judgement
from s2t_models.router import read_settings

_NAME = re.compile(r"r2r(?::(?P<router>.+))?")


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
    """The probability of a divergent token at or above `threshold`, by the router of the SLM's `engine`."""

    threshold: float
    engine: str = "slm"
    of_drafter: ClassVar[frozenset[Capability]] = CORE

    @property
    def needs(self) -> Needs:
        return {self.engine: frozenset({"route"})}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        slm = engines[self.engine]
        assert isinstance(slm, RoutingEngine)
        routed = await slm.route(drafted.prefix + drafted.ids, len(drafted.prefix) + drafted.first)
        values_T = routed.probabilities_T
        return Judgement(values_T, values_T >= self.threshold, usage={self.engine: routed.usage})


def names(hosting: Hosting) -> list[str]:
    return [alongside("r2r", router) for router in (None, *hosting.recipe.routers)]


def build(name: str, hosting: Hosting) -> Policy | None:
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    recipe, router = hosting.recipe, found["router"]
    engine = alongside("slm", router)
    if router and router not in recipe.routers:
        raise PolicyError(f"{name}: no router {router!r}; the recipe's routers: {', '.join(recipe.routers) or 'none'}")
    hosted = hosting.engines.get(engine) if router else hosting.slm
    if hosted is None:
        raise PolicyError(f"{name} needs the engine {engine}, which is not served here")
    if hosted.router is None:
        raise PolicyError(f"{name}: router.path is not set; `s2t distil --objective router` trains one")
    return Collaborate(
        name,
        RouterTrigger(read_settings(hosted.router).threshold, engine),
        TeacherScorer("vocabulary"),
        recipe.candidates,
        recipe.divergence.support,
        recipe.policies.chunk,
        drafter=engine,
    )
