"""Who decodes now, who waits, and who is told to come again: the gateway's bounded and fair queue.

An engine holds as many decodes as it has slots. Here a decode waits for a place in every engine it calls and keeps it
to its end, so a decode of many calls finds its prefix where it left it, however many others are about. Places go first
to the request that has the fewest, and no request has more than its share: a request of 128 samples leaves room for
the next one, and does not make each step of the engine as long as it could. When too many wait, a request is refused
at once.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

#: The share of an engine's places that one request may have: by itself, and where others have asked lately. A small
#: request takes as long as the steps that it shares with a big one.
ALONE, AMONG_OTHERS = 0.5, 0.25
#: How many seconds ago is lately.
LATELY_S = 1.0


class Busy(RuntimeError):
    """Too many wait already; `retry_after` says in how many seconds there may be room."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


@dataclass(eq=False)
class _Waiting:
    request: str
    engines: Collection[str]
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """`places` are the decodes that each engine holds at once, `most_waiting` the requests that may wait. It belongs to
    one event loop."""

    def __init__(self, places: Mapping[str, int], most_waiting: int) -> None:
        self._places, self._free = places, dict(places)
        self._most_waiting = most_waiting
        self._waiting: dict[str, deque[_Waiting]] = {}  # by request, none of them empty
        self._held: Counter[tuple[str, str]] = Counter()  # (request, engine) -> places
        self._asked: dict[str, float] = {}  # request -> when it last wanted a place
        self._seconds = 1.0  # that a place was lately kept for

    @property
    def waiting(self) -> int:
        """Requests that wait for their first place."""
        return sum(not self._most_held(queue[0]) for queue in self._waiting.values())

    @property
    def retry_after(self) -> int:
        """In how many seconds there may be room."""
        return max(1, math.ceil(self._seconds * self.waiting / min(self._places.values(), default=1)))

    def check(self) -> None:
        """Raise Busy where a new request would be one too many."""
        if self.waiting >= self._most_waiting:
            raise Busy(self.retry_after)

    def limit(self, requests: int) -> int:
        """How many requests there may be before `check` refuses one, where `requests` are here, waiting or not. While
        some wait, places that are free in other engines do not count: who takes one makes room with its answer."""
        waiting = self.waiting
        return requests - waiting + self._most_waiting + (0 if waiting else sum(self._free.values()))

    @asynccontextmanager
    async def place(self, request: str, engines: Collection[str]) -> AsyncGenerator[None]:
        """A place in each of the engines, for a decode of the request of that id."""
        waiting = _Waiting(request, engines)
        self._asked[request] = time.monotonic()
        self._waiting.setdefault(request, deque()).append(waiting)
        self._grant()
        try:
            await waiting.granted
        except asyncio.CancelledError:
            if waiting.granted.cancelled():
                self._leave(waiting)
                self._grant()  # what was kept for it
            else:  # it was given its place in the same turn of the loop
                self._give_back(waiting)
            raise
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
            self._give_back(waiting)

    def _grant(self) -> None:
        """Give out what is free, in order: the request with the fewest places first, then the one that came first. What
        one waits for is kept for it, so that those who need less do not pass it for ever."""
        kept: Counter[str] = Counter()
        most = self._most()
        for queue in sorted(self._waiting.values(), key=lambda queue: self._most_held(queue[0])):
            for one in tuple(queue):
                if one.granted.cancelled():  # its decode is about to be told
                    continue
                if any(self._held[one.request, name] >= most[name] for name in one.engines):
                    break
                if not all(self._free[name] > kept[name] for name in one.engines):
                    kept.update(name for name in one.engines if self._free[name] > kept[name])
                    break
                self._leave(one)
                for name in one.engines:
                    self._free[name] -= 1
                    self._held[one.request, name] += 1
                one.granted.set_result(None)

    def _leave(self, one: _Waiting) -> None:
        queue = self._waiting[one.request]
        queue.remove(one)
        if not queue:
            del self._waiting[one.request]

    def _most(self) -> dict[str, int]:
        """The places of each engine that one request may have now."""
        now = time.monotonic()
        self._asked = {request: when for request, when in self._asked.items() if now - when < LATELY_S}
        share = AMONG_OTHERS if len(self._asked) > 1 else ALONE
        return {name: max(1, math.ceil(share * count)) for name, count in self._places.items()}

    def _give_back(self, one: _Waiting) -> None:
        for name in one.engines:
            self._free[name] += 1
            self._held[one.request, name] -= 1
            if not self._held[one.request, name]:
                del self._held[one.request, name]
        self._grant()

    def _most_held(self, one: _Waiting) -> int:
        return max(self._held[one.request, name] for name in one.engines)
