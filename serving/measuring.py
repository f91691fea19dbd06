"""What answers take and cost, counted as their pieces pass."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict

from s2t_models.candidates import is_rescue
from serving import metrics
from serving.decoding import Ended, Piece


async def measured(policy: str, arrived: float, pieces: AsyncGenerator[Piece | Ended]) -> AsyncGenerator[Piece | Ended]:
    """The pieces of a choice as they are. `arrived` is when its request came, by `time.perf_counter`; the first token
    of a request is that of its first choice."""
    waits, decisions, rescues = True, 0, 0
    async with aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Ended):
                usage = {engine: asdict(cost) for engine, cost in piece.usage.items()}
                metrics.observe_decode(policy, usage, decisions, rescues)
            else:
                if waits and piece.ids and piece.choice == 0:
                    metrics.observe_first_token(policy, time.perf_counter() - arrived)
                    waits = False
                decisions += len(piece.decisions)
                rescues += sum(
                    is_rescue(decision.candidates_K, decision.logprobs_K, decision.chosen)
                    for decision in piece.decisions
                )
            yield piece
