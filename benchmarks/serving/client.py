"""The load: requests to the endpoint, what became of each, and the two ways to send many.

In a closed loop so many are under way at once, and the next one waits for an answer. In an open loop they come at their
own rate, whatever becomes of them. It knows the OpenAI API and nothing of models.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

#: What a refusal asks a closed loop to wait is kept to, up to this many seconds.
LONGEST_WAIT_S = 5.0
#: The longest line of a stream: its last event holds all samples of a vote.
LINE_BYTES = 2**22

Body = dict[str, Any]


@dataclass
class Outcome:
    """What became of a request. `status` is that of HTTP, None where there was none within the limit or the connection
    broke; `code` is the error's. A stream that begins and then fails has status 200 and a code. Times are
    `time.perf_counter`'s; `first_s` is when the first text came, of a stream that had `pieces` with text. `texts` are
    those of the choices, `usage` each engine's."""

    began_s: float
    ended_s: float = 0.0
    first_s: float | None = None
    pieces: int = 0
    status: int | None = None
    code: str | None = None
    retry_after_s: float | None = None
    hung: bool = False
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    usage: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def answered(self) -> bool:
        return self.status == 200 and self.code is None

    @property
    def refused(self) -> bool:
        """Told to ask again later."""
        return self.status in (429, 503) and self.retry_after_s is not None

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s

    @property
    def seconds_to_first(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.began_s

    @property
    def seconds_per_token(self) -> float | None:
        """From the first text to the end; None where all of it came at once, as of a vote."""
        if self.first_s is None or min(self.pieces, self.tokens) < 2:
            return None
        return (self.ended_s - self.first_s) / (self.tokens - 1)


class Client:
    """Asks the endpoint at `url` (.../v1). A request that has not ended after `limit_s` seconds hangs."""

    def __init__(self, session: aiohttp.ClientSession, url: str, limit_s: float) -> None:
        self._session, self.url, self._limit_s = session, url, limit_s

    async def ask(self, body: Body) -> Outcome:
        outcome = Outcome(time.perf_counter())
        try:
            async with (
                asyncio.timeout(self._limit_s),
                self._session.post(f"{self.url}/chat/completions", json=body) as response,
            ):
                await _read(response, outcome)
        except TimeoutError:
            outcome.hung = True
        except (aiohttp.ClientError, ConnectionError, ValueError, KeyError) as error:
            outcome.code = type(error).__name__
        outcome.ended_s = time.perf_counter()
        return outcome

    async def closed_loop(self, bodies: Iterable[Body], width: int) -> list[Outcome]:
        """All of the bodies, `width` at once. What is refused is not asked again, but waits as it was told."""
        waiting: Iterator[Body] = iter(bodies)
        outcomes: list[Outcome] = []

        async def work() -> None:
            for body in waiting:
                outcome = await self.ask(body)
                outcomes.append(outcome)
                await asyncio.sleep(min(outcome.retry_after_s or 0.0, LONGEST_WAIT_S))

        await asyncio.gather(*(work() for _ in range(width)))
        return outcomes

    async def open_loop(self, bodies: Iterable[Body], arrivals_s: Sequence[float]) -> list[Outcome]:
        """A body at each of the times, counted from now; returns once all have ended."""
        began = time.perf_counter()
        asked = []
        for at, body in zip(arrivals_s, bodies, strict=False):
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            asked.append(asyncio.ensure_future(self.ask(body)))
        return list(await asyncio.gather(*asked))


@asynccontextmanager
async def client(url: str, limit_s: float) -> AsyncIterator[Client]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=LINE_BYTES) as session:
        yield Client(session, url, limit_s)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process of `rate` a second, within `seconds`."""
    random = np.random.default_rng(seed)
    count = int(rate * seconds + 10 * np.sqrt(rate * seconds) + 10)  # more than come
    times = np.cumsum(random.exponential(1 / rate, count))
    return [float(time) for time in times if time < seconds]


async def _read(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    outcome.status = response.status
    if response.status != 200:
        wait = response.headers.get("Retry-After")
        outcome.retry_after_s = None if wait is None else float(wait)
        outcome.code = (await response.json())["error"]["code"]
    elif response.content_type == "text/event-stream":
        await _read_stream(response, outcome)
    else:
        answer = await response.json()
        outcome.texts = [choice["message"]["content"] for choice in answer["choices"]]
        _note_cost(answer, outcome)


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    texts: dict[int, list[str]] = {}
    ended = False
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            ended = True
            continue
        event = json.loads(line[6:])
        if "error" in event:
            outcome.code = event["error"]["code"]
            continue
        for choice in event["choices"]:
            text = choice["delta"].get("content") or ""
            texts.setdefault(choice["index"], []).append(text)
            if text:
                outcome.pieces += 1
                outcome.first_s = outcome.first_s or time.perf_counter()
        if event.get("usage"):
            _note_cost(event, outcome)
    outcome.texts = ["".join(texts[number]) for number in sorted(texts)]
    if not ended and outcome.code is None:
        outcome.code = "stream_cut"


def _note_cost(answer: dict[str, Any], outcome: Outcome) -> None:
    outcome.tokens = answer["usage"]["completion_tokens"]
    outcome.usage = answer["s2t"]["usage"]
