"""What an answer costs all server processes together, over the engine called directly."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.direct import DirectEngine
from benchmarks.serving.endpoint import GATEWAY, RAY, EndpointFailed, spent
from benchmarks.serving.parts import Load, streamed
from benchmarks.serving.tables import show

#: The processes of the table that are no engines.
_OTHERS = ("proxy", GATEWAY, "controller")
_HEADER = ("", "direct", *_OTHERS, "engines", "ratio", "of the rounds")


@dataclass
class Round:
    """So many problems asked of the engine called directly, and of the endpoint: CPU seconds of either, by process."""

    problems: int
    direct_s: float
    cpu_s: dict[str, float]


async def overhead(load: Load, direct: DirectEngine, widths: Sequence[int], requests: int, rounds: int) -> None:
    """CPU of all server processes over that of the engine called directly, in turn on the same problems."""
    rows = []
    for width in widths:
        # Each side gets problems of its own: the engine of the endpoint would know them the second time.
        whole, parts = [], []
        for _ in range(rounds + 1):
            whole.append(await _round(load, direct, width, requests, False))
            parts.append(await _round(load, direct, width, requests, True))
        # The first round warms up.
        rows.append(costs(f"{width} at once, whole", whole[1:]))
        rows.append(costs(f"{width} at once, streamed", parts[1:]))
    title = (
        "CPU of all server processes over the engine called directly, greedy, ms an answer (aim: at most 1.25 at 16)"
    )
    show(title, _HEADER, rows)


async def floor(load: Load, direct: DirectEngine, width: int, requests: int, rounds: int) -> None:
    """The same of an endpoint that does nothing, to which the engine's own cost is added."""
    found = [await _round(load, direct, width, requests, False) for _ in range(rounds + 1)]
    title = "CPU of an endpoint that does nothing, and of the engine called directly, ms an answer"
    show(title, _HEADER, [costs(f"{width} at once, whole", found[1:], engine=1.0)])


async def _round(load: Load, direct: DirectEngine, width: int, requests: int, streams: bool) -> Round:
    problems = [next(load.fresh) for _ in range(max(requests, width))]
    direct_s = await asyncio.to_thread(direct.greedy, problems, load.max_tokens, width)
    bodies = [load.body("greedy", problem) for problem in problems]
    before = load.processes.cpu()
    outcomes = await load.client.closed_loop([streamed(body) for body in bodies] if streams else bodies, width)
    cpu = {kind: seconds for kind, seconds in spent(before, load.processes.cpu()).items() if kind != RAY}
    if not all(outcome.answered for outcome in outcomes):
        raise EndpointFailed(f"with {width} at once it does not answer all; raise its slots")
    return Round(len(problems), direct_s, cpu)


def costs(name: str, rounds: Sequence[Round], engine: float = 0.0) -> list[str]:
    """A row of the table. `engine` is the share of the direct cost that counts as the endpoint's beside its own."""
    problems = sum(one.problems for one in rounds)
    shown = [sum(one.direct_s for one in rounds)]
    shown += [sum(one.cpu_s.get(kind, 0.0) for one in rounds) for kind in _OTHERS]
    shown.append(sum(seconds for one in rounds for kind, seconds in one.cpu_s.items() if kind not in _OTHERS))
    ratios = [engine + sum(one.cpu_s.values()) / one.direct_s for one in rounds]
    return [
        name,
        *(f"{1000 * seconds / problems:.1f}" for seconds in shown),
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} - {max(ratios):.2f}",
    ]
