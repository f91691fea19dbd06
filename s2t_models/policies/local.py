"""S2T-Local: the SLM selects among its own candidates by its reserved rows (Eq. 5), with no teacher at hand.

The loop is written once, over an engine that can `generate` up to a trigger and `select`. An engine may bring it fused,
in which the scoring pass is the next decode step: the same text, faster.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from s2t_models.candidates import candidates_at, reach
from s2t_models.engines.contract import (
    Decision,
    Draft,
    FusedSelecting,
    Sampling,
    Selection,
    Tell,
    Triggered,
    Usage,
    Written,
)
from s2t_models.engines.stopping import StopTexts
from s2t_models.hosting import LOCAL, Hosting, alongside
from s2t_models.policies.base import GREEDY, Done, Engines, Event, Needs, Policy, Request, Span, drafting, sampling
from s2t_models.policies.triggers import fixed_threshold, threshold_of
from s2t_models.policies.variants import candidates_of, decoding_as_named, kind_of, variant


@dataclass(frozen=True)
class Local(Policy):
    """S2T-Local behind its own trigger head, on the `engine` that holds the artifact."""

    name: str
    selection: Selection
    budget: float | None = None
    engine: str = LOCAL

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {self.engine: frozenset({"select"})}

    @property
    def k(self) -> int | None:  # type: ignore[override]
        return self.selection.candidates.k

    @property
    def kind(self) -> str:
        return kind_of(self.name)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        engine = engines[self.engine]
        asked = sampling(GREEDY, request, request.max_tokens)
        fused = engine if "fused_select" in (await engine.card()).capabilities else None

        async def call(tell: Tell | None) -> Draft:
            if isinstance(fused, FusedSelecting):
                return await fused.generate_selecting(request.prompt, asked, self.selection, tell)
            return await generate_selecting(engine, request.prompt, asked, self.selection, engines.decode, tell)

        step = 0
        async with aclosing(drafting(request, call)) as parts:
            async for part in parts:
                if isinstance(part, Draft):
                    yield Done(part.finish, {self.engine: part.usage})
                    continue
                for span in spans_of(part.ids, part.decisions, step):
                    yield span
                for decision in part.decisions:
                    yield decision
                step += len(part.ids)

    async def decide(self, engines: Engines, request: Request) -> tuple[Decision, bool, dict[str, Usage]]:
        """What the selector chooses behind the prompt, and whether its head triggers there (`base.Deciding`)."""
        engine, selection = engines[self.engine], self.selection
        always = replace(
            sampling(GREEDY, request, 1), trigger_threshold=-math.inf, trigger_support=reach(selection.candidates)
        )
        draft = await engine.generate(request.prompt, always)
        assert draft.triggered is not None
        decision, cost = await _decide(engine, request.prompt, draft.triggered, 0, request.seed, selection)
        return decision, draft.triggered.value >= selection.threshold, {self.engine: draft.usage + cost}


async def generate_selecting(
    engine: Any,
    prefix: list[int],
    asked: Sampling,
    selection: Selection,
    decode: Callable[[list[int]], str],
    tell: Tell | None = None,
) -> Draft:
    """Trigger, propose, score, select: the S2T-Local loop over an engine with the capability "select"."""
    stops = StopTexts(asked.stop, decode)
    end_ids = (await engine.card()).end_ids
    ids: list[int] = []
    decisions: list[Decision] = []
    usage = Usage()
    while len(ids) < asked.max_tokens:
        draft = await engine.generate(
            prefix + ids,
            replace(
                asked,
                max_tokens=asked.max_tokens - len(ids),
                first_step=asked.first_step + len(ids),
                trigger_threshold=selection.threshold,
                trigger_warmup=selection.warmup,
                trigger_support=reach(selection.candidates),
            ),
            tell,
        )
        ids, usage = ids + draft.ids, usage + draft.usage
        if draft.triggered is None:
            return Draft(ids, draft.finish, usage, decisions=decisions)
        decision, cost = await _decide(
            engine, prefix + ids, draft.triggered, asked.first_step + len(ids), asked.seed, selection
        )
        chosen = decision.chosen
        decisions.append(decision)
        ids, usage = [*ids, chosen], usage + cost + Usage(decode=1)
        if tell is not None:
            tell(Written([chosen], None, [decision]))
        if chosen in end_ids or stops.reached(ids):
            return Draft(ids, "end" if chosen in end_ids else "stop", usage, decisions=decisions)
    return Draft(ids, "length", usage, decisions=decisions)


async def _decide(
    engine: Any, state: list[int], seen: Triggered, step: int, seed: int, selection: Selection
) -> tuple[Decision, Usage]:
    """Propose, score and select at a state whose next step is `step`."""
    candidates_K, logprobs_K = candidates_at(seen.ids_N, seen.logprobs_N, selection.candidates, seed, step)
    selected = await engine.select(state, candidates_K)
    preferences_K = selection.preferences(selected.scores_K, logprobs_K)
    chosen = candidates_K[int(preferences_K.argmax())]
    scores_K = selected.scores_K.tolist()
    decision = Decision(step, seen.value, candidates_K, logprobs_K.tolist(), scores_K, preferences_K.tolist(), chosen)
    return decision, selected.usage


def spans_of(ids: list[int], decisions: list[Decision], first: int = 0) -> list[Span]:
    """Tokens by source: each decision's step alone, "selected", and the SLM's runs between them. `first` is the step of
    the first token."""
    spans, start = [], 0
    for decision in decisions:
        at = decision.step - first
        if at > start:
            spans.append(Span(ids[start:at], "slm"))
        spans.append(Span([decision.chosen], "selected"))
        start = at + 1
    return [*spans, Span(ids[start:], "slm")] if start < len(ids) else spans


def names(hosting: Hosting) -> list[str]:
    artifacts = (None, *hosting.recipe.artifacts)
    return [alongside(name, artifact) for artifact in artifacts for name in (LOCAL, f"{LOCAL}-w0")]


def build(name: str, hosting: Hosting) -> Policy | None:
    found = variant(name)
    if found is None or found.stem != LOCAL or found.metric or found.ratio is not None:
        return None
    hosting = decoding_as_named(name, found, hosting)
    recipe = hosting.recipe
    fixed = found.budget is None and fixed_threshold("head", recipe) is not None
    selection = Selection(
        threshold=threshold_of(name, "head", found.budget, hosting),
        candidates=candidates_of(name, found, recipe),
        prior_weight=recipe.policies.local.prior_weight if found.weight is None else found.weight,
        temperature=recipe.distil.temperature,
        warmup=recipe.trigger.warmup,
    )
    budget = None if fixed else recipe.budget if found.budget is None else found.budget
    return Local(name, selection, budget, found.engine)
