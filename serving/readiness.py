"""Whether a gateway's engines answer, asked with a time-out and not more often than is of use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextvars import Context

from s2t_models.engines.contract import ModelCard

#: An engine that has not answered within this time is not there.
ANSWERS_WITHIN_S = 3.0
#: How old an answer may be: many probes cost one call.
FRESH_S = 1.0
#: How old an answer may be for a request to be refused by it.
RECENT_S = 5.0


class Readiness:
    """`engines` maps an engine's name to a function that gives its card where it is well, and raises where not."""

    def __init__(self, engines: Mapping[str, Callable[[], Awaitable[ModelCard]]]) -> None:
        self._engines = engines
        self._asked: asyncio.Task[dict[str, ModelCard | None]] | None = None
        self._known: dict[str, ModelCard | None] = {}
        self._when = -RECENT_S

    async def cards(self) -> dict[str, ModelCard | None]:
        """Each engine's card, None where it does not answer."""
        # Of several that wait for it, one going away must not take it from the others.
        return await asyncio.shield(self._refreshed())

    def silent(self) -> set[str]:
        """The engines that lately did not answer, without waiting; they are asked again for the next time."""
        self._refreshed()
        recent = time.monotonic() - self._when <= RECENT_S
        return {name for name, card in self._known.items() if card is None} if recent else set()

    def _refreshed(self) -> asyncio.Task[dict[str, ModelCard | None]]:
        if self._asked is None or (self._asked.done() and time.monotonic() - self._when > FRESH_S):
            # In a context of its own: Serve ends the calls of a request that is gone, and this is not one request's.
            self._asked = asyncio.create_task(self._ask(), context=Context())
        return self._asked

    async def _ask(self) -> dict[str, ModelCard | None]:
        cards = await asyncio.gather(*(_within(ask) for ask in self._engines.values()))
        self._known = dict(zip(self._engines, cards, strict=True))
        self._when = time.monotonic()
        return self._known


async def _within(ask: Callable[[], Awaitable[ModelCard]]) -> ModelCard | None:
    """Whatever an engine fails with, what it says is that it does not answer."""
    try:
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            return await ask()
    except Exception:
        return None
