"""The benchmark of the endpoint under load: its arithmetic, its verdicts, and short runs against a real endpoint."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from benchmarks.serving.client import Body, Outcome, arrivals, client
from benchmarks.serving.endpoint import Processes, spent
from benchmarks.serving.overhead import Round, costs
from benchmarks.serving.parts import Load, closed, questions
from benchmarks.serving.soak import kills_engines, soak, verdict
from benchmarks.serving.tables import percentiles, together

ANSWERED = Outcome(began_s=0.0, ended_s=2.0, first_s=1.0, pieces=3, status=200, texts=["six eggs"], tokens=6)


def test_arrivals_are_those_of_a_poisson_process():
    times = arrivals(rate=500, seconds=20, seed=3)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] < 20
    assert len(times) == pytest.approx(10_000, rel=0.05)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.05)
    assert times == arrivals(rate=500, seconds=20, seed=3)
    assert times != arrivals(rate=500, seconds=20, seed=4)


def test_percentiles_are_those_of_what_is_there():
    assert percentiles([None, *range(101)], (50, 95)) == [50, 95]
    assert together(percentiles([0.1, 0.3], (50,)), 1000, 0) == "200"
    assert together(percentiles([None]), 1000, 0) == "-"


def test_a_requests_times():
    assert (ANSWERED.seconds, ANSWERED.seconds_to_first, ANSWERED.seconds_per_token) == (2.0, 1.0, 0.2)
    assert replace(ANSWERED, first_s=None).seconds_per_token is None
    assert replace(ANSWERED, pieces=1).seconds_per_token is None


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "right"),
        ({"texts": ["six egg"]}, "wrong"),
        ({"texts": []}, "wrong"),
        ({"texts": ["six eggs", "six eggs"]}, "wrong"),
        ({"hung": True, "status": None}, "hung"),
        ({"status": 503, "code": "engine_unavailable", "retry_after_s": 2.0}, "refused"),
        ({"status": 429, "code": "overloaded", "retry_after_s": 2.0}, "refused"),
        ({"status": 503, "code": "engine_unavailable"}, "failed"),
        ({"status": 500, "code": "internal_error", "retry_after_s": 2.0}, "failed"),
        ({"status": None, "code": "ServerDisconnectedError"}, "failed"),
        ({"code": "engine_unavailable", "texts": ["six"]}, "broken off"),
        ({"code": "engine_unavailable", "texts": ["sex"]}, "wrong"),
        ({"code": "internal_error", "texts": ["six"]}, "failed"),
    ],
)
def test_verdicts(changes: dict[str, Any], found: str):
    assert verdict(replace(ANSWERED, **changes), ["six eggs"]) == found


def ask(url: str, body: Body, limit_s: float = 60) -> Outcome:
    async def send() -> Outcome:
        async with client(f"{url}/v1", limit_s) as asking:
            return await asking.ask(body)

    return asyncio.run(send())


def test_refusals_and_requests_that_hang_are_told_apart(stub):
    body = {"model": "greedy", "messages": [{"role": "user", "content": "?"}]}
    answered = ask(stub.url, body)
    assert (answered.answered, answered.tokens, answered.usage["slm"]["decode"]) == (True, 5, 5)
    stub.fault = lambda body, n: (429, {"error": {"code": "overloaded"}}, {"Retry-After": "7"})
    refused = ask(stub.url, body)
    assert (refused.refused, refused.retry_after_s, refused.code) == (True, 7.0, "overloaded")
    stub.fault = lambda body, n: (500, b"no JSON", {})
    assert ask(stub.url, body).code is not None
    stub.delay_s = 5.0
    assert ask(stub.url, body, limit_s=0.05).hung


@pytest.mark.parametrize(
    ("events", "code"),
    [
        (['{"error": {"code": "engine_unavailable"}}', "[DONE]"], "engine_unavailable"),
        ([], "stream_cut"),
        (["[DONE]"], None),
    ],
)
def test_streams_that_break_off_are_no_answers(events: list[str], code: str | None):
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for text in ("", "six ", "eggs"):
            await response.write(
                f'data: {{"choices": [{{"index": 0, "delta": {{"content": "{text}"}}}}]}}\n\n'.encode()
            )
        for event in events:
            await response.write(f"data: {event}\n\n".encode())
        return response

    async def run() -> Outcome:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        async with client(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", 60) as asking:
            outcome = await asking.ask({})
        await runner.cleanup()
        return outcome

    outcome = asyncio.run(run())
    assert (outcome.code, outcome.texts, outcome.answered) == (code, ["six eggs"], code is None)
    assert outcome.began_s < outcome.first_s <= outcome.ended_s
    assert outcome.pieces == 2


def test_replicas_are_known_by_their_titles_and_killed():
    replica = subprocess.Popen(
        ["sh", "-c", "read line", "ServeReplica:s2t:s2t-local.call"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        processes = Processes(replica.pid)
        assert {kind: [p.pid for p in found] for kind, found in processes.by_kind().items()} == {
            "s2t-local": [replica.pid]
        }
        assert processes.memory()["s2t-local"] > 0
        assert not kills_engines(processes, ["slm"])(random.Random(0))
        assert kills_engines(processes, ["slm", "s2t-local"])(random.Random(0))
        assert replica.wait(60) == -signal.SIGKILL
    finally:
        replica.kill()


def test_cpu_is_counted_between_two_looks():
    before = {("slm", 1): 5.0, ("Ray", 2): 1.0, ("gateway", 3): 2.0}
    after = {("slm", 1): 6.5, ("teacher", 2): 2.0, ("slm", 4): 0.5}
    assert spent(before, after) == {"slm": 2.0, "teacher": 1.0}


class Changing:
    """A client whose endpoint answers as it should until `wrong_from`, and then something else."""

    def __init__(self, wrong_from: int) -> None:
        self.asked, self.wrong_from = 0, wrong_from

    async def ask(self, body: Body) -> Outcome:
        await asyncio.sleep(0.001)
        self.asked += 1
        now = time.perf_counter()
        return Outcome(now, now, status=200, texts=["seven eggs" if self.asked > self.wrong_from else "six eggs"])


def test_costs_are_shares_of_the_engine_called_directly():
    cpu = {"proxy": 0.2, "gateway": 0.3, "controller": 0.1, "slm": 2.0, "teacher": 0.2}
    rounds = [Round(10, 2.0, cpu), Round(10, 2.8, cpu), Round(20, 4.0, {**cpu, "slm": 7.2})]
    shown = ["220.0", "15.0", "22.5", "7.5", "295.0"]  # ms a problem
    assert costs("served", rounds) == ["served", *shown, "1.40", "1.00 - 2.00"]
    assert costs("beside", rounds, engine=1.0) == ["beside", *shown, "2.40", "2.00 - 3.00"]


@pytest.mark.parametrize(("wrong_from", "is_well"), [(10**9, True), (30, False)])
def test_a_soak_finds_answers_that_change(wrong_from: int, is_well: bool):
    load = Load(Changing(wrong_from), Processes(os.getpid()), 8, questions())
    soaked = asyncio.run(soak(load, ["greedy"], 0.005, 4, lambda draw: True, 0.01, seed=1))
    counts = soaked.verdicts["greedy"]
    assert counts["right"] > 0
    assert (counts["wrong"] == 0, soaked.is_well) == (is_well, is_well)
    assert soaked.kills > 0


def test_a_short_closed_loop_and_a_short_soak(endpoint: str, capsys: pytest.CaptureFixture[str]):
    processes = Processes(os.getsid(0))

    async def run():
        async with client(endpoint, 120) as asking:
            load = Load(asking, processes, 12, questions())
            await closed(load, ["greedy", "maj@2"], [2], requests=4)
            return await soak(load, ["greedy", "sample", "s2t"], 0.04, 2, lambda draw: False, 60, seed=0)

    soaked = asyncio.run(run())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("greedy", "maj@2"))]
    rates, costs = rows[:2], rows[2:]
    for row in rates:
        assert row[1] == "2"
        assert float(row[2]) > 0
        assert row[-2:] == ["0", "0"]
    assert [row[0] for row in costs] == ["greedy", "maj@2"]
    assert soaked.is_well, soaked.bad
    assert sum(counts["right"] for counts in soaked.verdicts.values()) > 0
    assert len(soaked.memory) == 3
    assert {"proxy", "gateway", "controller", "slm", "teacher"} <= soaked.memory[0].keys()
