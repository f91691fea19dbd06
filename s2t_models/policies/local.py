"""S2T-Local: the SLM selects among its own candidates by its reserved rows (Eq. 5), with no teacher at hand.

The loop runs inside the engine that holds the artifact; this file only names its settings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from s2t_models.engines.contract import Draft, Selection
from s2t_models.policies.base import GREEDY, Done, Engines, Event, Request, Span


def spans_of(draft: Draft) -> list[Span]:
    """The draft's tokens by source: each decision's step alone, "selected", and the SLM's runs between them."""
    spans, start = [], 0
    for decision in draft.decisions:
        if decision.step > start:
            spans.append(Span(draft.ids[start : decision.step], "slm"))
        spans.append(Span([decision.chosen], "selected"))
        start = decision.step + 1
    return [*spans, Span(draft.ids[start:], "slm")] if start < len(draft.ids) else spans


@dataclass(frozen=True)
class Local:
    """One `generate_selecting` call to the engine "s2t-local"."""

    name: str
    selection: Selection
    needs: tuple[str, ...] = ("s2t-local",)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        sampling = GREEDY.sampling(request, request.max_tokens)
        draft = await engines["s2t-local"].generate_selecting(request.prompt, sampling, self.selection)
        for span in spans_of(draft):
            yield span
        for decision in draft.decisions:
            yield decision
        yield Done(draft.finish, {"s2t-local": draft.usage})
