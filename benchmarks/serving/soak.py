"""The soak: a mix of requests for minutes, while replicas are killed, each answer held against the one given alone."""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import psutil

from benchmarks.serving.client import Body, Outcome
from benchmarks.serving.endpoint import Processes
from benchmarks.serving.parts import Load, streamed
from benchmarks.serving.tables import percentiles, show, together

#: What a request of the soak may come to. "broken off" is a stream whose engine died behind its beginning; the last
#: three must not be.
Verdict = Literal["right", "refused", "broken off", "wrong", "hung", "failed"]
VERDICTS: tuple[Verdict, ...] = ("right", "refused", "broken off", "wrong", "hung", "failed")
BAD: tuple[Verdict, ...] = ("wrong", "hung", "failed")
#: How a stream may end that began well.
UNAVAILABLE = "engine_unavailable"
#: How many of the bad ones are told of.
SHOWN = 5

Killer = Callable[[random.Random], bool]


@dataclass
class Soaked:
    """What a soak came to: verdicts of each policy, latencies of the right ones, replicas killed, and resident bytes by
    process at its start, middle and end."""

    verdicts: dict[str, Counter[Verdict]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    kills: int = 0
    memory: list[dict[str, int]] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not any(counts[verdict] for counts in self.verdicts.values() for verdict in BAD)


def verdict(outcome: Outcome, right: Sequence[str]) -> Verdict:
    """What became of a request whose answer, asked alone, has the texts `right`."""
    if outcome.hung:
        return "hung"
    if outcome.answered:
        return "right" if outcome.texts == list(right) else "wrong"
    if outcome.refused:
        return "refused"
    if outcome.status == 200 and outcome.code == UNAVAILABLE:
        begins = all(whole.startswith(text) for text, whole in zip(outcome.texts, right, strict=False))
        return "broken off" if begins else "wrong"
    return "failed"


def kills_engines(processes: Processes, engines: Sequence[str]) -> Killer:
    """Kills a replica of the engines, drawn at random; says whether there was one."""

    def kill(draw: random.Random) -> bool:
        replicas = sorted(processes.replicas(engines), key=lambda process: process.pid)
        with suppress(psutil.Error):
            if replicas:
                draw.choice(replicas).kill()
                return True
        return False

    return kill


async def soak(
    load: Load, policies: Sequence[str], minutes: float, width: int, kill: Killer, kill_every_s: float, seed: int
) -> Soaked:
    """Ask `width` at once for so many minutes; a replica is killed every `kill_every_s` seconds on average."""
    mix: list[Body] = []
    for policy in policies:
        for number in range(4):
            body = load.body(policy, seed=number)
            mix += [body, streamed(body)]
    alone = [await load.client.ask(body) for body in mix]
    if failed := [outcome for outcome in alone if not outcome.answered]:
        raise RuntimeError(f"before the soak a request came to status {failed[0].status}, {failed[0].code}")
    soaked = Soaked({policy: Counter() for policy in policies}, {policy: [] for policy in policies})
    draw, deadline = random.Random(seed), time.monotonic() + 60 * minutes

    def note(number: int, outcome: Outcome) -> None:
        policy, found = mix[number]["model"], verdict(outcome, alone[number].texts)
        soaked.verdicts[policy][found] += 1
        if found == "right":
            soaked.seconds[policy].append(outcome.seconds)
        elif found in BAD:
            told = f"{policy}, {'streamed' if 'stream' in mix[number] else 'whole'}: {found}"
            told += f": status {outcome.status}, {outcome.code}, after {outcome.seconds:.1f} s"
            soaked.bad.append(told + (f"\n  alone {alone[number].texts}\n  now   {outcome.texts}" * (found == "wrong")))

    async def work() -> None:
        while time.monotonic() < deadline:
            number = draw.randrange(len(mix))
            outcome = await load.client.ask(mix[number])
            note(number, outcome)
            wait = outcome.retry_after_s or 0.0
            await asyncio.sleep(max(0.0, min(wait, deadline - time.monotonic())))

    async def killing() -> None:
        killer = random.Random(seed + 1)
        while True:
            await asyncio.sleep(killer.expovariate(1 / kill_every_s))
            soaked.kills += await asyncio.to_thread(kill, killer)

    async def telling() -> None:
        for minute in itertools.count(1):
            await asyncio.sleep(60)
            counts = sum(soaked.verdicts.values(), Counter[Verdict]())
            told = ", ".join(f"{counts[one]} {one}" for one in VERDICTS if counts[one])
            print(f"soak: {minute} of {minutes:g} min, {soaked.kills} killed: {told}", file=sys.stderr, flush=True)

    async def looking() -> None:
        for part in itertools.count():
            soaked.memory.append(await asyncio.to_thread(load.processes.memory))
            if part == 2:
                return
            await asyncio.sleep(30 * minutes)

    beside = [asyncio.ensure_future(killing()), asyncio.ensure_future(telling())]
    looker = asyncio.ensure_future(looking())
    await asyncio.gather(*(work() for _ in range(width)))
    for task in beside:
        task.cancel()
    await looker
    return soaked


def report(soaked: Soaked, minutes: float, width: int) -> None:
    show(
        f"Soak: {minutes:g} minutes, {width} at once, {soaked.kills} replicas killed (aim: none wrong, hung or failed)",
        ["policy", *VERDICTS, "right ones s p50 / p95 / p99"],
        [
            [
                policy,
                *(str(counts[one]) for one in VERDICTS),
                together(percentiles(soaked.seconds[policy]), 1, 2),
            ]
            for policy, counts in soaked.verdicts.items()
        ],
    )
    start, middle, end = soaked.memory
    show(
        "Memory of the processes, MB (an engine that was killed has begun anew)",
        ["", "start", "middle", "end", "end / middle"],
        [
            [
                kind,
                *(f"{sizes.get(kind, 0) / 2**20:.0f}" for sizes in (start, middle, end)),
                f"{end.get(kind, 0) / middle[kind]:.3f}" if middle.get(kind) else "-",
            ]
            for kind in sorted(start.keys() | end.keys())
        ],
    )
    for told in soaked.bad[:SHOWN]:
        print(told)
