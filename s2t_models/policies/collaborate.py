"""Collaborative decoding, Algorithm 1: one model writes, and at triggered steps a scorer decides (S2T, Takeover, R2R).

The SLM drafts a chunk greedily; the trigger judges the whole draft, for a divergence trigger with one teacher forward;
the first critical step at which another token is chosen cuts it, and decoding goes on behind that token. A draft that
was cut is only work thrown away: the tokens are those of step-by-step decoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np

from s2t_models.engines.contract import Decision, Finish, Selection, Usage
from s2t_models.engines.stopping import StopTexts
from s2t_models.hosting import LOCAL, Hosting, alongside
from s2t_models.policies.base import (
    CORE,
    GREEDY,
    Done,
    Engines,
    Event,
    Needs,
    Policy,
    Request,
    Span,
    check_fits,
    sampling,
)
from s2t_models.policies.scorers import CriticalStep, Scorer, SelectorScorer, TeacherScorer
from s2t_models.policies.triggers import TRIGGERS, Drafted, Judgement, Trigger, budget_of, make_trigger
from s2t_models.policies.variants import Variant, candidates_of, decoding_as_named, kind_of, variant
from s2t_models.recipe import Recipe
from s2t_models.settings import CandidateSettings


@dataclass(frozen=True)
class Collaborate(Policy):
    """trigger x proposer x scorer (Eq. 9). `drafter` is the engine that writes and proposes. `chunk` bounds the draft's
    length, `support` is N, and the first `warmup` steps never trigger."""

    name: str
    trigger: Trigger
    scorer: Scorer
    candidates: CandidateSettings = field(default_factory=CandidateSettings)
    support: int = 64
    chunk: int = 16
    warmup: int = 0
    drafter: str = "slm"
    budget: float | None = None

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        needs: dict[str, frozenset] = {self.drafter: self.trigger.of_drafter}
        for part in (self.trigger.needs, self.scorer.needs):
            for engine, capabilities in part.items():
                needs[engine] = needs.get(engine, CORE) | capabilities
        return needs

    @property
    def k(self) -> int | None:  # type: ignore[override]
        return None if self.scorer.source == "teacher" else self.candidates.k

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        await check_fits(engines, self.needs, request)
        drafter = engines[self.drafter]
        end_ids, stops = (await drafter.card()).end_ids, StopTexts(request.stop, engines.decode)
        usage: dict[str, Usage] = defaultdict(Usage)
        tokens, prompt, length = list(request.prompt), len(request.prompt), self.chunk
        finish: Finish | None = None
        while finish is None and (step := len(tokens) - prompt) < request.max_tokens:
            budget = min(length, request.max_tokens - step)
            draft = await drafter.generate(
                tokens, sampling(GREEDY, request, budget, first_step=step, support=self.support)
            )
            usage[self.drafter] += draft.usage

            drafted = Drafted(tokens, draft.ids, draft.supported, step, max(0, self.warmup - step), request.seed)
            judgement = await self._judge(engines, drafted)
            _add(usage, judgement.usage)
            written, told = draft.ids, 0
            for row in np.flatnonzero(judgement.fires_T):
                critical = CriticalStep(drafted, judgement, int(row))
                if told < critical.at:
                    yield Span(draft.ids[told : critical.at], "slm")
                decision, cost = await self.scorer.decide(engines, critical, self.candidates)
                _add(usage, cost)
                yield Span([decision.chosen], self.scorer.source)
                yield decision
                told = critical.at + 1
                # Behind a token that stands as drafted the rest of the draft and of the judgement holds.
                if decision.chosen != draft.ids[critical.at]:
                    written = [*draft.ids[: critical.at], decision.chosen]
                    break
            if told < len(written):
                yield Span(written[told:], "slm")
            tokens = tokens + written
            if tokens[-1] in end_ids:
                finish = "end"
            elif stops.reached(tokens[prompt:]):
                finish = "stop"
            # Cuts come in bursts: draft less after one, more again where the draft held.
            length = max(1, length // 2) if written != draft.ids else min(self.chunk, 2 * length)
        yield Done(finish or "length", dict(usage))

    async def decide(self, engines: Engines, request: Request) -> tuple[Decision, bool, dict[str, Usage]]:
        """What the scorer chooses behind the prompt, and whether the trigger fires there (`base.Deciding`)."""
        asked = sampling(GREEDY, request, 1, support=self.support)
        draft = await engines[self.drafter].generate(request.prompt, asked)
        usage: dict[str, Usage] = defaultdict(Usage, {self.drafter: draft.usage})
        drafted = Drafted(request.prompt, draft.ids, draft.supported, 0, 0, request.seed)
        judgement = await self.trigger.judge(engines, drafted)
        decision, cost = await self.scorer.decide(engines, CriticalStep(drafted, judgement, 0), self.candidates)
        for costs in (judgement.usage, cost):
            _add(usage, costs)
        return decision, bool(judgement.fires_T[0]), dict(usage)

    async def _judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        if drafted.first >= len(drafted.ids):
            return Judgement(np.empty(0), np.empty(0, dtype=bool))
        return await self.trigger.judge(engines, drafted)


def _add(usage: dict[str, Usage], costs: dict[str, Usage]) -> None:
    for name, cost in costs.items():
        usage[name] += cost


def names(hosting: Hosting) -> list[str]:
    """S2T and Takeover at the recipe's trigger, then at the others; S2T-Local behind a trigger that is not its head."""
    metrics = [metric for metric, kind in TRIGGERS.items() if kind.make]
    others = [metric for metric in metrics if metric != hosting.recipe.trigger.metric]
    artifacts = (None, *hosting.recipe.artifacts)
    return [
        *("takeover", "s2t", "s2t-dynamic-01", "s2t-dynamic-05"),
        *(f"{stem}-{metric}" for metric in others for stem in ("takeover", "s2t")),
        *(alongside(f"{LOCAL}-{metric}", artifact) for artifact in artifacts for metric in metrics),
    ]


def build(name: str, hosting: Hosting) -> Policy | None:
    found = variant(name)
    if found is None or (found.stem == LOCAL and found.metric is None):
        return None
    hosting = decoding_as_named(name, found, hosting)
    recipe = hosting.recipe
    candidates = candidates_of(name, found, recipe)
    scorer = _scorer(found, candidates, recipe)
    if scorer is None:
        return None
    metric = found.metric or recipe.trigger.metric
    return Collaborate(
        name,
        make_trigger(name, metric, found.budget, hosting),
        scorer,
        candidates,
        recipe.divergence.support,
        recipe.policies.chunk,
        recipe.trigger.warmup,
        found.engine if found.stem == LOCAL else "slm",
        budget_of(name, found.budget, recipe),
    )


def _scorer(found: Variant, candidates: CandidateSettings, recipe: Recipe) -> Scorer | None:
    """None where the name asks for what its kind of policy has not got."""
    if found.stem == LOCAL:
        if found.ratio is not None:
            return None
        weight = recipe.policies.local.prior_weight if found.weight is None else found.weight
        return SelectorScorer(Selection(0.0, candidates, weight, recipe.distil.temperature), found.engine)
    if found.weight is not None:
        return None
    if found.stem == "takeover":
        return None if found.proposes else TeacherScorer("vocabulary")
    return TeacherScorer("candidate")
