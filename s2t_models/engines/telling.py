"""A draft as a stream: the parts that an engine tells of, as an async generator that ends with the whole draft."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import numpy as np

from s2t_models.engines.contract import Draft, Support, Tell, Written


async def told(
    call: Callable[[Tell], Coroutine[Any, Any, Draft]], every_s: float = 0.0
) -> AsyncGenerator[Written | Draft]:
    """The parts of a call as they come, then its draft. Parts are joined that came while the last was being taken, or
    within `every_s` seconds of it. Closed early, the call is cancelled."""
    parts: list[Written] = []
    news = asyncio.Event()

    def tell(part: Written) -> None:
        parts.append(part)
        news.set()

    task = asyncio.ensure_future(call(tell))
    task.add_done_callback(lambda _: news.set())
    try:
        while parts or not task.done():
            if not parts:
                await news.wait()
            news.clear()
            if parts:
                ready = joined(parts)
                parts.clear()
                yield ready
                if every_s:
                    await asyncio.wait([task], timeout=every_s)
        yield await task
    finally:
        task.cancel()


def joined(parts: list[Written]) -> Written:
    """Consecutive parts as one."""
    supports = [part.support for part in parts if part.support is not None]
    support = None
    if supports:
        entropies = [each.entropy_T for each in supports if each.entropy_T is not None]
        support = Support(
            np.concatenate([each.ids_TN for each in supports]),
            np.concatenate([each.logprobs_TN for each in supports]),
            np.concatenate(entropies) if entropies else None,
        )
    ids = [token for part in parts for token in part.ids]
    return Written(ids, support, [decision for part in parts for decision in part.decisions])
