"""Which steps of a draft are critical (g_t, section 4.1): by divergence, by the SLM's entropy, or at random.

A trigger judges a whole draft at once, and hands on the teacher's scores where it had to ask for them.
Axes: _T step of the draft from the first that may trigger, _N the SLM's top-N support.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from s2t_models.engines.contract import Draft, Scores, Usage
from s2t_models.noise import uniforms
from s2t_models.policies.base import Engines


@dataclass(frozen=True)
class Judgement:
    """`values_T` the trigger's values and `fires_T` where it fires; `scores` the teacher's over the same steps, if asked."""

    values_T: np.ndarray
    fires_T: np.ndarray
    scores: Scores | None = None
    usage: dict[str, Usage] = field(default_factory=dict)


@dataclass(frozen=True)
class Drafted:
    """A draft after `prefix`, whose steps before `first` may not trigger; `step` counts the tokens decoded before it."""

    prefix: list[int]
    draft: Draft
    step: int
    first: int
    seed: int


class Trigger(Protocol):
    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement: ...


@dataclass(frozen=True)
class DivergenceTrigger:
    """KL(SLM || teacher) at or above `threshold` nats: one teacher forward a draft."""

    threshold: float
    tail: Literal["bucket", "renormalised"] = "bucket"

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        import torch

        from s2t_models.divergence import divergence

        draft, first = drafted.draft, drafted.first
        assert draft.top_ids_TN is not None
        assert draft.top_logprobs_TN is not None
        # The last drafted token is not read: no step of this draft follows it, and it may be cut.
        scores = await engines["teacher"].score(
            drafted.prefix + draft.ids[:-1], len(drafted.prefix) + first, draft.top_ids_TN[first:]
        )
        slm_TN, teacher_TN = torch.as_tensor(draft.top_logprobs_TN[first:]), torch.as_tensor(scores.logprobs_TN)
        values_T = divergence(slm_TN, teacher_TN, self.tail).numpy()
        return Judgement(values_T, values_T >= self.threshold, scores, {"teacher": scores.usage})


@dataclass(frozen=True)
class EntropyTrigger:
    """The entropy of the SLM's next-token distribution at or above `threshold` nats."""

    threshold: float

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        values_T = drafted.draft.entropy_T[drafted.first :]
        return Judgement(values_T, values_T >= self.threshold)


@dataclass(frozen=True)
class RandomTrigger:
    """A share `budget` of the steps, drawn from (seed, step) alone."""

    budget: float

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        steps = range(drafted.step + drafted.first, drafted.step + len(drafted.draft.ids))
        values_T = np.array([uniforms(drafted.seed, step, 1, "trigger")[0] for step in steps])
        return Judgement(values_T, values_T < self.budget)
