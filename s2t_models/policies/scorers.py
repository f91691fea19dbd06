"""Who chooses at a triggered step, and how (the scorer of Eq. 9): the teacher, or the selector of an artifact.

Each scorer proposes the SLM's candidates, scores them, and decides. Axes: _N the drafting model's support, _K
candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from s2t_models.candidates import candidates_at
from s2t_models.engines.contract import Decision, Selecting, Selection, Usage
from s2t_models.hosting import LOCAL
from s2t_models.policies.base import CORE, Engines, Needs, Source
from s2t_models.policies.triggers import Drafted, Judgement
from s2t_models.settings import CandidateSettings


@dataclass(frozen=True)
class CriticalStep:
    """A triggered step of a draft: the `row`-th that was judged, the `at`-th of the draft."""

    drafted: Drafted
    judgement: Judgement
    row: int

    @property
    def at(self) -> int:
        return self.drafted.first + self.row

    @property
    def step(self) -> int:
        """Counted from the start of the output."""
        return self.drafted.step + self.at

    @property
    def state(self) -> list[int]:
        """s_t: the tokens before it."""
        return self.drafted.prefix + self.drafted.ids[: self.at]

    @property
    def value(self) -> float:
        return float(self.judgement.values_T[self.row])

    def candidates(self, settings: CandidateSettings) -> tuple[list[int], np.ndarray]:
        """The candidates and the drafting model's log-probabilities of them."""
        support = self.drafted.support
        return candidates_at(
            support.ids_TN[self.at], support.logprobs_TN[self.at], settings, self.drafted.seed, self.step
        )

    def teacher(self, candidates_K: list[int]) -> tuple[list[float], int] | None:
        """The teacher's probabilities of the candidates and its own choice, where the trigger asked it."""
        scores = self.judgement.scores
        if scores is None:
            return None
        place = {int(token): n for n, token in enumerate(self.drafted.support.ids_TN[self.at])}
        logprobs_N = np.asarray(scores.logprobs_TN[self.row], dtype=np.float64)
        return np.exp([logprobs_N[place[token]] for token in candidates_K]).tolist(), int(scores.argmax_T[self.row])


class Scorer(Protocol):
    """`source` is what the chosen token is marked as; `needs` are the engines it asks."""

    @property
    def source(self) -> Source: ...

    @property
    def needs(self) -> Needs: ...

    async def decide(
        self, engines: Engines, critical: CriticalStep, candidates: CandidateSettings
    ) -> tuple[Decision, dict[str, Usage]]: ...


@dataclass(frozen=True)
class TeacherScorer:
    """The teacher's probability of each candidate; with `takes` "candidate" the best one is chosen (S2T), with
    "vocabulary" the teacher's own argmax takes over (Takeover). A teacher call of its own only where the trigger made
    none."""

    takes: Literal["candidate", "vocabulary"] = "candidate"

    @property
    def source(self) -> Source:
        return "selected" if self.takes == "candidate" else "teacher"

    @property
    def needs(self) -> Needs:
        return {"teacher": CORE}

    async def decide(
        self, engines: Engines, critical: CriticalStep, candidates: CandidateSettings
    ) -> tuple[Decision, dict[str, Usage]]:
        candidates_K, logprobs_K = critical.candidates(candidates)
        cost: dict[str, Usage] = {}
        known = critical.teacher(candidates_K)
        if known is None:
            state = critical.state
            scores = await engines["teacher"].score(state, len(state), np.array([candidates_K]))
            known = np.exp(scores.logprobs_TN[0].astype(np.float64)).tolist(), int(scores.argmax_T[0])
            cost = {"teacher": scores.usage}
        teacher_K, argmax = known
        return Decision(
            step=critical.step,
            value=critical.value,
            candidates_K=candidates_K,
            logprobs_K=logprobs_K.tolist(),
            scores_K=teacher_K,
            preferences_K=teacher_K,
            chosen=candidates_K[int(np.argmax(teacher_K))] if self.takes == "candidate" else argmax,
            argmax=argmax,
            teacher_K=teacher_K,
        ), cost


@dataclass(frozen=True)
class SelectorScorer:
    """The reserved rows' score of each candidate (Eq. 5), from the `engine` that holds the artifact: S2T-Local behind
    another trigger than its head, so that the selector's error shows apart from the trigger's. What the teacher says is
    noted where the trigger asked it, and decides nothing."""

    selection: Selection
    engine: str = LOCAL

    @property
    def source(self) -> Source:
        return "selected"

    @property
    def needs(self) -> Needs:
        return {self.engine: frozenset({"select"})}

    async def decide(
        self, engines: Engines, critical: CriticalStep, candidates: CandidateSettings
    ) -> tuple[Decision, dict[str, Usage]]:
        candidates_K, logprobs_K = critical.candidates(candidates)
        local = engines[self.engine]
        assert isinstance(local, Selecting)
        selected = await local.select(critical.state, candidates_K)
        preferences_K = self.selection.preferences(selected.scores_K, logprobs_K)
        teacher_K, argmax = critical.teacher(candidates_K) or (None, None)
        return Decision(
            step=critical.step,
            value=critical.value,
            candidates_K=candidates_K,
            logprobs_K=logprobs_K.tolist(),
            scores_K=selected.scores_K.tolist(),
            preferences_K=preferences_K.tolist(),
            chosen=candidates_K[int(preferences_K.argmax())],
            argmax=argmax,
            teacher_K=teacher_K,
        ), {self.engine: selected.usage}
