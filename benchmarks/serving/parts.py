"""What is measured of a served recipe: closed and open loops, fairness, places."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Body, Client, Outcome, arrivals
from benchmarks.serving.endpoint import GATEWAY, RAY, EndpointFailed, Processes, spent
from benchmarks.serving.tables import percentiles, show, together
from s2t_models.embedded.generator import problems

#: Requests at once that find out what the endpoint can do.
FULL = 64
#: The share of an open loop that passes before it counts: until then the queue fills.
WARM_UP = 1 / 3
#: The tokens of a tiny request, and the choices of one that is big.
TINY, BIG = 5, 128
#: A few decodes that go on until their tokens are spent.
FEW, ENDLESS = 7, {"temperature": 2.0, "top_p": 1.0, "top_k": 0, "max_tokens": 800}
#: How long a big request has been under way when the first tiny one comes.
HEAD_START_S = 0.3


@dataclass
class Load:
    """Who asks, whose processes are looked at, and how long an answer may be. Each problem is asked once: an engine
    remembers what it has read."""

    client: Client
    processes: Processes
    max_tokens: int
    fresh: Iterator[str]

    def body(self, policy: str, question: str | None = None, **settings: Any) -> Body:
        """A request to `policy`, of a fresh problem where none is given."""
        question = next(self.fresh) if question is None else question
        messages = [{"role": "user", "content": question}]
        return {"model": policy, "messages": messages, "max_tokens": self.max_tokens, "seed": 0} | settings

    def bodies(self, policy: str, count: int, **settings: Any) -> list[Body]:
        return [self.body(policy, **settings) for _ in range(count)]


def questions(seed: int = 0) -> Iterator[str]:
    """Problems without end."""
    for number in itertools.count(seed * 1000):
        yield from (problem.question for problem in problems("train", 500, seed=number))


def streamed(body: Body) -> Body:
    return body | {"stream": True, "stream_options": {"include_usage": True}}


async def closed(load: Load, policies: Sequence[str], widths: Sequence[int], requests: int) -> None:
    """Every policy at every width: rates and latencies, and CPU by process."""
    rates, costs = [], []
    for policy in policies:
        await load.client.closed_loop(load.bodies(policy, 2), 2)  # the first ones set things up
        for width in widths:
            bodies = [streamed(body) for body in load.bodies(policy, max(requests, 2 * width))]
            before, own, began = load.processes.cpu(), time.process_time(), time.perf_counter()
            outcomes = await load.client.closed_loop(bodies, width)
            seconds, own = time.perf_counter() - began, time.process_time() - own
            cpu = spent(before, load.processes.cpu())
            done = [outcome for outcome in outcomes if outcome.answered]
            rates.append(
                [
                    policy,
                    str(width),
                    f"{len(done) / seconds:.1f}",
                    f"{sum(outcome.tokens for outcome in done) / seconds:.0f}",
                    together(percentiles(outcome.seconds_to_first for outcome in done), 1000, 0),
                    together(percentiles(outcome.seconds_per_token for outcome in done), 1000, 1),
                    together(percentiles(outcome.seconds for outcome in done), 1, 2),
                    str(sum(outcome.refused for outcome in outcomes)),
                    str(sum(not outcome.answered and not outcome.refused for outcome in outcomes)),
                ]
            )
            engines = sum(value for kind, value in cpu.items() if kind not in ("proxy", GATEWAY, "controller", RAY))
            parts = [cpu.get("proxy", 0.0), cpu.get(GATEWAY, 0.0), cpu.get("controller", 0.0), engines]
            shown = [*parts, cpu.get(RAY, 0.0), own]
            costs.append([policy, str(width), *(f"{1000 * value / max(len(done), 1):.1f}" for value in shown)])
    show(
        "Closed loop, streamed: p50 / p95 / p99",
        [
            *("policy", "at once", "requests/s", "tokens/s", "first token ms", "per token ms"),
            *("whole answer s", "refused", "failed"),
        ],
        rates,
    )
    show(
        "CPU by process, ms a request",
        ["policy", "at once", "proxy", "gateway", "controller", "engines", "Ray", "the load itself"],
        costs,
    )


async def opened(load: Load, policy: str, multiples: Sequence[float], seconds: float, seed: int) -> None:
    """Arrivals at multiples of what the endpoint can do, which is found out anew before each of them."""
    rows = []
    for multiple in multiples:
        capacity = await _capacity(load, policy)
        times = arrivals(multiple * capacity, seconds, seed)
        bodies = load.bodies(policy, len(times))
        before, own, began = load.processes.cpu(), time.process_time(), time.perf_counter()
        outcomes = await load.client.open_loop(bodies, times)
        lasted, own = time.perf_counter() - began, time.process_time() - own
        taken = sum(spent(before, load.processes.cpu()).values())
        start, stop = began + WARM_UP * seconds, began + seconds
        window = stop - start
        came = [outcome for outcome in outcomes if start <= outcome.began_s < stop]
        refused = [outcome for outcome in came if outcome.refused]
        accepted = [outcome for outcome in came if outcome.answered]
        finished = sum(outcome.answered and start <= outcome.ended_s < stop for outcome in outcomes)
        rows.append(
            [
                f"{multiple:g}x",
                f"{capacity:.1f}",
                f"{len(came) / window:.1f}",
                f"{len(accepted) / window:.1f}",
                f"{len(refused) / window:.1f}",
                f"{finished / window / capacity:.2f}",
                together(percentiles((outcome.seconds for outcome in accepted), (50, 95)), 1, 2),
                together(percentiles((outcome.seconds for outcome in refused), (95,)), 1000, 0),
                f"{taken / lasted:.2f} / {own / lasted:.2f}",
                str(sum(not outcome.answered and not outcome.refused for outcome in outcomes)),
            ]
        )
    show(
        f"Open loop, {policy}: arrivals at multiples of the capacity (aim: throughput above 0.9 of it at 10x, the "
        "accepted keep their latency, refusals come at once)",
        [
            *("arrivals", "capacity/s", "came/s", "accepted/s", "refused/s", "throughput / capacity"),
            *("accepted s p50 / p95", "refusal ms p95", "cores: endpoint / load", "failed"),
        ],
        rows,
    )


async def _capacity(load: Load, policy: str) -> float:
    """Answers a second with FULL requests at once, without the beginning and the end, where there are fewer."""
    outcomes = await load.client.closed_loop(load.bodies(policy, 3 * FULL), FULL)
    ends = sorted(outcome.ended_s for outcome in outcomes if outcome.answered)[FULL // 2 : -FULL]
    if len(ends) < 2:
        raise EndpointFailed(f"with {FULL} at once it refuses too many to tell what it can do; raise its slots")
    return (len(ends) - 1) / (ends[-1] - ends[0])


async def fairness(load: Load, samples: int) -> None:
    """A tiny request's latency alone, beside one big request, and beside a few decodes, which is what a batch costs."""
    bigs = {
        f"{FEW} decodes": load.body("sample", n=FEW, **ENDLESS),
        f"sample, n = {BIG}": load.body("sample", n=BIG),
        f"maj@{BIG}": load.body(f"maj@{BIG}"),
    }
    alone = [await _tiny(load) for _ in range(samples)]
    rows = [["alone", together(percentiles(alone, (50, 95)), 1000, 0), "", "", ""]]
    for name, body in bigs.items():
        beside: list[float] = []
        outcomes: list[Outcome] = []
        while len(beside) < samples:
            big = asyncio.ensure_future(load.client.ask(body | {"seed": len(outcomes)}))
            await asyncio.sleep(HEAD_START_S)
            while not big.done() and len(beside) < samples:
                seconds = await _tiny(load)
                if not big.done():
                    beside.append(seconds)
            outcomes.append(await big)
            if not outcomes[-1].answered:
                break
        failed = sum(not outcome.answered for outcome in outcomes)
        ratio = f"{statistics.median(beside) / statistics.median(alone):.2f}" if beside else "-"
        took = together(percentiles((outcome.seconds for outcome in outcomes), (50,)), 1, 2)
        rows.append([f"beside {name}", together(percentiles(beside, (50, 95)), 1000, 0), ratio, took, str(failed)])
    show(
        f"Fairness: a request of {TINY} tokens (aim: under 3 times its latency alone)",
        ["", "ms p50 / p95", "ratio of medians", "big ones: s p50", "failed"],
        rows,
    )


async def _tiny(load: Load) -> float:
    return (await load.client.ask(load.body("greedy", max_tokens=TINY))).seconds


async def places(load: Load, policy: str, widths: Sequence[int], requests: int) -> None:
    """The teacher's tokens an answer, with fewer and with more decodes at once than the engines have places."""
    bodies = load.bodies(policy, requests)
    await load.client.closed_loop(load.bodies(policy, max(widths)), max(widths))
    read: list[float] = []
    rows = []
    for width in widths:
        outcomes = [outcome for outcome in await load.client.closed_loop(bodies, width) if outcome.answered]
        cost = [outcome.usage.get("teacher", {}) for outcome in outcomes]
        read.append(sum(one.get("prefill", 0) for one in cost) / max(len(cost), 1))
        forwards = sum(one.get("forwards", 0) for one in cost) / max(len(cost), 1)
        ratio = f"{read[-1] / read[0]:.3f}" if read[0] else "-"
        rows.append([str(width), str(len(outcomes)), f"{read[-1]:.1f}", f"{forwards:.1f}", ratio])
    show(
        f"Places: what the teacher reads for an answer of {policy} (aim: the same however many are at once)",
        ["at once", "answers", "teacher tokens read", "teacher forwards", "ratio to the first"],
        rows,
    )
