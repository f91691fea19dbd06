"""Whether many streamed answers at once are those that the same requests get alone and whole."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from benchmarks.serving.client import Body, Outcome
from benchmarks.serving.parts import Load, streamed
from benchmarks.serving.tables import show


async def exact(load: Load, policies: Sequence[str], answers: int, width: int) -> bool:
    """Ask `answers` requests, spread over the policies, one after the other; then the same ones streamed, `width` at
    once. Returns whether each was answered with the same text."""
    bodies: list[Body] = [load.body(policies[number % len(policies)], seed=number) for number in range(answers)]
    alone = []
    for body in bodies:
        alone.append(await load.client.ask(body))
        if len(alone) % 100 == 0:
            print(f"exact: {len(alone)} of {answers} asked alone", file=sys.stderr, flush=True)
    room = asyncio.Semaphore(width)

    async def ask(body: Body) -> Outcome:
        async with room:
            return await load.client.ask(streamed(body))

    together = await asyncio.gather(*(ask(body) for body in bodies))
    rows, is_well = [], True
    for policy in policies:
        asked = [number for number, body in enumerate(bodies) if body["model"] == policy]
        answered = [number for number in asked if alone[number].answered and together[number].answered]
        equal = sum(alone[number].texts == together[number].texts for number in answered)
        is_well &= equal == len(asked)
        rows.append([policy, str(len(asked)), str(len(answered)), str(equal)])
    show(
        f"Streamed, {width} at once, against whole and alone (aim: all equal)",
        ["policy", "asked", "answered both times", "equal"],
        rows,
    )
    return is_well
