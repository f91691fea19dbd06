"""Rollouts that the teacher rescues (`collect.writer` = s2t): the SLM drafts, and at the steps where the two diverge
the teacher's choice among its candidates stands (Algorithm 1), as S2T decodes.

The readings that chose are the labels: the teacher reads no text again. What it read of drafts that were cut is counted
with the rest.

Axes: _T step, _N the SLM's top-N support.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipelines.collect.actors import Rollouts, Row, labels, teacher_rank
from pipelines.collect.schemas import LABELLED
from s2t_models import chat
from s2t_models.engines.contract import Capability, Engine
from s2t_models.hosting import Hosted, Hosting
from s2t_models.policies.base import Engines, Needs, Request, gather
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.scorers import TeacherScorer
from s2t_models.policies.triggers import Drafted, Judgement, Trigger, make_trigger, threshold_of
from s2t_models.recipe import Recipe

#: What errors call it.
NAME = "collect.writer s2t"


def deciding(hosting: Hosting) -> dict[str, Any]:
    """The settings beyond those of every collection that decide what S2T writes and what the teacher reads for it."""
    candidates = {f"candidates.{key}": value for key, value in hosting.recipe.candidates.model_dump().items()}
    return candidates | {"trigger.threshold": threshold_of(NAME, "kl", None, hosting)}


def rescuing(hosting: Hosting) -> Collaborate:
    """S2T as it writes a collection: with the recipe's candidates, triggered by KL at its threshold, or at that of its
    budget in `trigger.calibration`. Raises PolicyError where there is neither."""
    recipe = hosting.recipe
    return Collaborate(
        NAME,
        make_trigger(NAME, "kl", None, hosting),
        TeacherScorer("candidate"),
        recipe.candidates,
        recipe.divergence.support,
        recipe.collect.chunk,
    )


@dataclass
class Readings:
    """A trigger that keeps what it judges one text by, of every step: the SLM's support, and what the teacher says of
    it. `tokens` is how many the teacher read, those of drafts that were cut among them."""

    trigger: Trigger
    tokens: int = 0
    _steps: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return self.trigger.needs

    @property
    def of_drafter(self) -> frozenset[Capability]:
        return self.trigger.of_drafter | {"entropy"}

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        judgement = await self.trigger.judge(engines, drafted)
        support, scores = drafted.support, judgement.scores
        assert scores is not None
        assert support.entropy_T is not None
        # Its log-probabilities of a draft take a token a step, also where an earlier draft had the same one.
        self.tokens += len(drafted.ids) if drafted.step else len(drafted.prefix) - 1 + len(drafted.ids)
        # What was said behind a step that was decided otherwise is not of this text.
        self._steps[drafted.step :] = zip(
            support.ids_TN, support.logprobs_TN, support.entropy_T, scores.logprobs_TN, scores.argmax_T, strict=True
        )
        return judgement

    def columns(self, recipe: Recipe, seed: int, steps: int) -> Row:
        """The columns that say what both models make of the text's `steps` steps."""
        of_steps = zip(*self._steps[:steps], strict=True)
        ids_TN, drafted_TN, entropy_T, read_TN, argmax_T = (np.stack(column) for column in of_steps)
        return {
            "entropy_T": entropy_T,
            "teacher_read": self.tokens,
            "teacher_argmax_T": argmax_T,
            "teacher_rank_T": teacher_rank(ids_TN, argmax_T),
            **labels(ids_TN, drafted_TN, read_TN, recipe, seed),
        }


class RescuedRollouts(Rollouts):
    """Labelled rollouts of a batch of prompts. `hosted` is the SLM, and `teachers` share the texts."""

    made: ClassVar[pa.Schema] = LABELLED

    def __init__(
        self, recipe: Recipe, hosted: Hosted, policy: Collaborate, teachers: Sequence[Engine], board: Any = None
    ) -> None:
        super().__init__(recipe, hosted, board)
        self.policy, self.teachers = policy, teachers
        # Of a text that finds no slot the whole prefix would be read again at every call.
        actors = recipe.collect.rollout.actors
        self.places = asyncio.Semaphore(max(min(recipe.slm.slots, recipe.teacher.slots * len(teachers) // actors), 1))

    async def write(self, prompt_ids: list[int], row: Row) -> Row:
        collect, readings = self.recipe.collect, Readings(self.policy.trigger)
        running = {"slm": self.engine, "teacher": self.teachers[row["index"] % len(self.teachers)]}
        engines = Engines(running, lambda ids: chat.decode(self.tokenizer, ids), self.tokenizer.encode)
        asked = Request(prompt_ids, collect.max_new_tokens, row["seed"], row["temperature"] or None, collect.top_p)
        async with self.places:
            answer = await gather(replace(self.policy, trigger=readings).decode(engines, asked))
        written = {"output_ids": answer.ids, "finish": answer.finish}
        return written | readings.columns(self.recipe, row["seed"], len(answer.ids))
