"""Which steps of a draft are critical (g_t, section 4.1): by divergence, by the SLM's entropy, or at random.

A trigger judges a whole draft at once, and hands on the teacher's scores where it had to ask for them. `TRIGGERS` is
the one table of them; the trigger head is in it too, although it fires inside the engine that holds the artifact.
Axes: _T step of the draft from the first that may trigger, _N the drafting model's top-N support.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np

from s2t_models.engines.contract import Capability, Scores, Support, Usage
from s2t_models.hosting import Hosting
from s2t_models.noise import uniforms
from s2t_models.policies.base import CORE, Engines, Needs
from s2t_models.policies.errors import PolicyError
from s2t_models.recipe import Recipe


@dataclass(frozen=True)
class Judgement:
    """`values_T` the trigger's values and `fires_T` where it fires; `scores` the teacher's over the same steps, if
    asked."""

    values_T: np.ndarray
    fires_T: np.ndarray
    scores: Scores | None = None
    usage: dict[str, Usage] = field(default_factory=dict)


@dataclass(frozen=True)
class Drafted:
    """A draft after `prefix`, whose steps before `first` may not trigger; `step` counts the tokens decoded before
    it."""

    prefix: list[int]
    ids: list[int]
    support: Support
    step: int
    first: int
    seed: int


class Trigger(Protocol):
    """`needs` are the engines it asks; `of_drafter` is what it needs of the one that drafts, beyond the core."""

    @property
    def needs(self) -> Needs: ...

    @property
    def of_drafter(self) -> frozenset[Capability]: ...

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement: ...


@dataclass(frozen=True)
class DivergenceTrigger:
    """KL(SLM || teacher) at or above `threshold` nats: one teacher forward a draft."""

    threshold: float
    tail: Literal["bucket", "renormalised"] = "bucket"
    of_drafter: ClassVar[frozenset[Capability]] = CORE

    @property
    def needs(self) -> Needs:
        return {"teacher": CORE}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        import torch

        from s2t_models.divergence import divergence

        support, first = drafted.support, drafted.first
        # The last drafted token is not read: no step of this draft follows it, and it may be cut.
        scores = await engines["teacher"].score(
            drafted.prefix + drafted.ids[:-1], len(drafted.prefix) + first, support.ids_TN[first:]
        )
        slm_TN, teacher_TN = torch.as_tensor(support.logprobs_TN[first:]), torch.as_tensor(scores.logprobs_TN)
        values_T = divergence(slm_TN, teacher_TN, self.tail).numpy()
        return Judgement(values_T, values_T >= self.threshold, scores, {"teacher": scores.usage})


@dataclass(frozen=True)
class EntropyTrigger:
    """The entropy of the drafting model's next-token distribution at or above `threshold` nats."""

    threshold: float
    of_drafter: ClassVar[frozenset[Capability]] = frozenset({"entropy"})

    @property
    def needs(self) -> Needs:
        return {}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        if drafted.support.entropy_T is None:
            raise ValueError("the engine gives no entropy: the capability 'entropy' is missing")
        values_T = drafted.support.entropy_T[drafted.first :]
        return Judgement(values_T, values_T >= self.threshold)


@dataclass(frozen=True)
class RandomTrigger:
    """A share `budget` of the steps, drawn from (seed, step) alone."""

    budget: float
    of_drafter: ClassVar[frozenset[Capability]] = CORE

    @property
    def needs(self) -> Needs:
        return {}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        steps = range(drafted.step + drafted.first, drafted.step + len(drafted.ids))
        values_T = np.array([uniforms(drafted.seed, step, 1, "trigger")[0] for step in steps])
        return Judgement(values_T, values_T < self.budget)


@dataclass(frozen=True)
class TriggerKind:
    """`make` builds the trigger from its threshold, or from the budget itself where `calibrated` is False; None where
    it fires inside an engine."""

    make: Callable[[float, Recipe], Trigger] | None
    calibrated: bool = True


TRIGGERS: dict[str, TriggerKind] = {
    "kl": TriggerKind(lambda threshold, recipe: DivergenceTrigger(threshold, recipe.divergence.tail)),
    "entropy": TriggerKind(lambda threshold, recipe: EntropyTrigger(threshold)),
    "random": TriggerKind(lambda budget, recipe: RandomTrigger(budget), calibrated=False),
    "head": TriggerKind(None),
}


def budget_of(name: str, budget: float | None, recipe: Recipe) -> float:
    """The budget that a policy's name says, else the recipe's. Raises PolicyError where it is no share."""
    value = recipe.budget if budget is None else budget
    if not 0 < value <= 1:
        raise PolicyError(f"{name}: a budget is a share of the steps above 0 and up to 1")
    return value


def threshold_of(name: str, metric: str, budget: float | None, hosting: Hosting) -> float:
    """The threshold of a metric at a budget: one that the recipe fixes, else the calibrated one. Raises PolicyError
    where there is none."""
    recipe = hosting.recipe
    if not TRIGGERS[metric].calibrated:
        return budget_of(name, budget, recipe)
    if (fixed := fixed_threshold(metric, recipe)) is not None and budget is None:
        return fixed
    wanted, known = budget_of(name, budget, recipe), hosting.thresholds.get(metric, {})
    if wanted in known:
        return known[wanted]
    remedy = (
        "none (distil an artifact)"
        if metric == "head"
        else "none (set trigger.calibration to what `s2t collect --calibration` wrote)"
    )
    calibrated = ", ".join(f"{tau:g}" for tau in sorted(known)) or remedy
    raise PolicyError(f"{name}: no {metric} threshold for budget {wanted:g}; calibrated budgets: {calibrated}")


def fixed_threshold(metric: str, recipe: Recipe) -> float | None:
    """The threshold that the recipe sets for a metric, whatever the budget; the head's is given as a probability."""
    if metric == "head":
        p = recipe.trigger.head_threshold
        return None if p is None else math.log(p / (1 - p))
    return recipe.trigger.threshold if metric == recipe.trigger.metric else None


def make_trigger(name: str, metric: str, budget: float | None, hosting: Hosting) -> Trigger:
    """The trigger of a policy. Raises PolicyError where there is no threshold for it."""
    make = TRIGGERS[metric].make
    assert make is not None, f"{metric} fires inside the engine"
    return make(threshold_of(name, metric, budget, hosting), hosting.recipe)
