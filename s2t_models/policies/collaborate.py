"""Collaborative decoding, Algorithm 1: the SLM writes, and at triggered steps the teacher selects (S2T) or takes over.

The SLM drafts a chunk greedily; the trigger judges the whole draft, for a divergence trigger with one teacher forward;
the first critical step cuts it, and decoding goes on behind the chosen token. A draft that was cut is only work thrown
away: the tokens are those of step-by-step decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from s2t_models.candidates import propose
from s2t_models.engines.contract import Decision, Engine, Usage
from s2t_models.noise import uniforms
from s2t_models.policies.base import GREEDY, Done, Engines, Event, Request, Source, Span, check_fits
from s2t_models.policies.triggers import Drafted, Judgement, Trigger
from s2t_models.recipe import Candidates


@dataclass(frozen=True)
class Collaborate:
    """trigger x proposer x scorer (Eq. 9). The proposer is the SLM (`candidates`); the scorer is the teacher's probability
    of each candidate (`selects` "candidates", S2T) or its own argmax over the vocabulary ("vocabulary", Takeover).

    `chunk` bounds the draft's length, `support` is N, and the first `warmup` steps never trigger."""

    name: str
    trigger: Trigger
    selects: Literal["candidates", "vocabulary"]
    candidates: Candidates = field(default_factory=Candidates)
    support: int = 64
    chunk: int = 16
    warmup: int = 0
    needs: tuple[str, ...] = ("slm", "teacher")

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        await check_fits(engines, self.needs, request)
        slm, teacher = engines["slm"], engines["teacher"]
        end_ids = (await slm.card()).end_ids
        source: Source = "selected" if self.selects == "candidates" else "teacher"
        usage: dict[str, Usage] = defaultdict(Usage)
        tokens, prompt, length, ended = list(request.prompt), len(request.prompt), self.chunk, False
        while not ended and (step := len(tokens) - prompt) < request.max_tokens:
            budget = min(length, request.max_tokens - step)
            sampling = GREEDY.sampling(request, budget, first_step=step, support=self.support)
            draft = await slm.generate(tokens, sampling)
            usage["slm"] += draft.usage

            drafted = Drafted(tokens, draft, step, max(0, self.warmup - step), request.seed)
            judgement = await self._judge(engines, drafted)
            for name, cost in judgement.usage.items():
                usage[name] += cost
            critical = np.flatnonzero(judgement.fires_T)
            kept = draft.ids[: drafted.first + int(critical[0])] if len(critical) else draft.ids
            if kept:
                yield Span(kept, "slm")
            if len(critical):
                decision, cost = await self._select(teacher, drafted, judgement, int(critical[0]))
                usage["teacher"] += cost
                yield Span([decision.chosen], source)
                yield decision
                kept = [*kept, decision.chosen]
            tokens = tokens + kept
            ended = tokens[-1] in end_ids
            # Critical steps come in bursts: draft less after one, more again where the draft held.
            length = max(1, length // 2) if len(critical) else min(self.chunk, 2 * length)
        yield Done("end" if ended else "length", dict(usage))

    async def _judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        if drafted.first >= len(drafted.draft.ids):
            return Judgement(np.empty(0), np.empty(0, dtype=bool))
        return await self.trigger.judge(engines, drafted)

    async def _select(
        self, teacher: Engine, drafted: Drafted, judgement: Judgement, row: int
    ) -> tuple[Decision, Usage]:
        """Propose and score at the judged step `row`; a second teacher call only where the trigger made none."""
        draft, at = drafted.draft, drafted.first + row
        assert draft.top_ids_TN is not None
        assert draft.top_logprobs_TN is not None
        step, cost = drafted.step + at, Usage()
        if judgement.scores is not None:
            teacher_N, argmax = judgement.scores.logprobs_TN[row], int(judgement.scores.argmax_T[row])
        else:
            state = drafted.prefix + draft.ids[:at]
            scores = await teacher.score(state, len(state), draft.top_ids_TN[at : at + 1])
            teacher_N, argmax, cost = scores.logprobs_TN[0], int(scores.argmax_T[0]), scores.usage
        settings = self.candidates
        slm_N = draft.top_logprobs_TN[at]
        noise_K = uniforms(drafted.seed, step, settings.k, "candidates")
        chosen_K = propose(slm_N, settings.k, settings.method, settings.ratio, noise_K)
        candidates_K = [int(token) for token in draft.top_ids_TN[at][chosen_K]]
        scores_K = np.exp(np.asarray(teacher_N, dtype=np.float64)[chosen_K])
        selected = candidates_K[int(scores_K.argmax())]
        return Decision(
            step=step,
            value=float(judgement.values_T[row]),
            candidates_K=candidates_K,
            logprobs_K=[float(logprob) for logprob in slm_N[chosen_K]],
            scores_K=[float(score) for score in scores_K],
            chosen=selected if self.selects == "candidates" else argmax,
            argmax=argmax,
        ), cost
