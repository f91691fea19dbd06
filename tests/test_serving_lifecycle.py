"""`s2t serve` as a process of its own: engines that hang, gateways that die, ends in the middle of answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import children, ctrl_c, end, free_port, start, wait_until

from s2t_models.hosting import host
from s2t_models.recipe import load_recipe
from serving import app

pytestmark = pytest.mark.cluster

KEY = "correct-horse-battery"


@dataclass
class Served:
    """A running `s2t serve`: its process, its root URL, and what it has said on stderr so far."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]
    access_log: Path

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, **options)

    def chat(self, **settings: Any) -> httpx.Response:
        body = {"model": "greedy", "messages": [{"role": "user", "content": "Ada has 3 eggs."}], "max_tokens": 8}
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body | settings, headers=headers, timeout=200)

    def replica(self, deployment: str) -> int:
        return children(self.process, f"ServeReplica:s2t:{deployment}")[0]

    def is_ready(self) -> bool:
        try:
            return self.get("/health").status_code == 200
        except httpx.HTTPError:
            return False

    def finish(self) -> tuple[int, str]:
        """The exit status and stdout."""
        try:
            status = self.process.wait(120)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.stdout is not None
        return status, self.process.stdout.read()


def serve(recipe_path: Path, folder: Path, *settings: str) -> Served:
    port = free_port()
    log = folder / "access.jsonl"
    chosen = [f"serving.port={port}", f"serving.access_log={log}", "serving.request_timeout_s=100", *settings]
    process = start(
        *("-m", "serving.app", "--recipe", str(recipe_path)),
        *(part for setting in chosen for part in ("--set", setting)),
        S2T_API_KEYS=f"ann={KEY}",
    )
    served = Served(process, f"http://127.0.0.1:{port}", [], log)
    threading.Thread(target=lambda: served.said.extend(iter(process.stderr.readline, "")), daemon=True).start()
    return served


@pytest.fixture
def served(recipe_path: Path, tmp_path: Path) -> Iterator[Served]:
    served = serve(recipe_path, tmp_path, "serving.gateway_replicas=2", "serving.drain_s=300")
    try:
        wait_until(served.is_ready, served.process)
        yield served
    finally:
        if served.process.poll() is None:
            os.killpg(served.process.pid, signal.SIGKILL)
            served.process.wait()


def until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_what_breaks_is_told_and_mended_and_what_is_in_flight_is_answered_at_the_end(served: Served):
    """One story, for a cluster takes long to start: an engine hangs, a gateway dies, the endpoint ends under load."""
    assert served.chat().status_code == 200
    assert httpx.post(f"{served.url}/v1/chat/completions", json={}, timeout=60).status_code == 401
    assert any(re.match(r"serve: loading .*(slm|teacher).* s$", line) for line in served.said), served.said

    # Gateways share what comes at once, once both are up. Each one's counters, whichever is asked.
    until(lambda: served.get("/metrics").text.count("s2t_in_flight{") == 2)
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(served.chat, max_tokens=64) for _ in range(16)]
        assert [future.result(200).status_code for future in asked] == [200] * 16
    until(lambda: sum(answers(served).values()) == 17)
    assert len(answers(served)) == 2, answers(served)

    # A stopped engine: not ready, nobody waits for longer than the time-out, and then another in its place.
    stopped = served.replica("slm")
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(served.chat)
        until(lambda: served.get("/health").status_code == 503)
        assert "no answer from slm" in served.get("/health").json()["error"]["message"]
        assert served.get("/livez").status_code == 200
        assert served.chat(model="llm").status_code == 200, "the teacher is well"
        response = hanging.result(100)
    assert response.status_code in (200, 503), response.text
    if response.status_code == 503:
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert "retry-after" in response.headers
    until(served.is_ready)
    assert served.replica("slm") != stopped
    assert served.chat().status_code == 200

    # Gateways that are killed under their requests.
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.chat, model="maj@16", max_tokens=400, temperature=1.5) for _ in range(8)]
        until(lambda: in_flight(served) == 8)
        for gateway in children(served.process, "ServeReplica:s2t:gateway"):
            os.kill(gateway, signal.SIGKILL)
        for future in asked:
            response = future.result(200)
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "gateway_unavailable"
            assert "retry-after" in response.headers
            assert len(response.headers.get_list("x-request-id")) == 1
    until(served.is_ready)

    # Ctrl-C: what is in flight is answered, what comes is refused.
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.chat, model="maj@8", max_tokens=300, temperature=1.5) for _ in range(8)]
        until(lambda: in_flight(served) == 8)
        ctrl_c(served.process)
        until(lambda: served.get("/health").status_code == 503)
        until(lambda: is_refused(served.chat()))  # the gateways hear of it one after the other
        assert [future.result(200).status_code for future in asked] == [200] * 8
    status, _ = served.finish()
    assert status == 130
    lines = [line.rstrip() for line in served.said]
    assert lines[-2:] == ["serve: ending; 8 in flight have 300 s (Ctrl-C again ends at once)", "serve: stopped"]
    assert [line for line in lines if not line.startswith("serve: ")] == []

    entries = [json.loads(line) for line in served.access_log.read_text().splitlines()]
    assert {entry["key"] for entry in entries if entry["status"] == 200 and entry["method"] == "POST"} == {"ann"}
    assert KEY not in served.access_log.read_text()


def answers(served: Served) -> dict[str, float]:
    """How many greedy answers each gateway has given, by any gateway's account."""
    found: dict[str, float] = {}
    for line in served.get("/metrics").text.splitlines():
        if line.startswith("s2t_requests_total{") and 'policy="greedy"' in line and 'status="200"' in line:
            replica = re.findall('replica="([^"]+)"', line)[0]
            found[replica] = float(line.rpartition(" ")[2])
    return found


def is_refused(response: httpx.Response) -> bool:
    return response.status_code == 503 and bool(response.json()["error"]["code"] == "shutting_down")


def in_flight(served: Served) -> int:
    values = re.findall(r"^s2t_in_flight\{.*\} ([\d.]+)$", served.get("/metrics").text, re.MULTILINE)
    return int(sum(map(float, values)))


def test_ctrl_c_while_engines_load_ends_in_one_line(recipe_path: Path, tmp_path: Path):
    served = serve(recipe_path, tmp_path)
    wait_until(lambda: any("loading" in line for line in served.said), served.process)
    ctrl_c(served.process)
    status, out = served.finish()
    assert (status, out) == (130, "")
    assert served.said[-1] == "serve: stopped\n"
    assert all(line.startswith("serve: ") for line in served.said), served.said


@pytest.mark.slow
def test_two_benchmarks_serve_at_once_on_one_machine(recipe_path: Path, tmp_path: Path):
    def begin(name: str) -> subprocess.Popen[str]:
        return start(
            *("-m", "pipelines.benchmark", "--recipe", str(recipe_path), "--output", str(tmp_path / name)),
            *("--policies", "greedy", "--items", "4", "--seeds", "0", "--set", "collect.prompts=50"),
            *("--tracking", f"sqlite:///{tmp_path / name}.db"),
        )

    processes = [begin("a"), begin("b")]
    for process in processes:
        status, _, err = end(process, 500)
        assert status == 0, err
    keys = [{path.read_text().count('"key"') for path in tmp_path.glob(f"{name}/answers/*.jsonl")} for name in "ab"]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_requests_are_answered_while_the_application_is_replaced(
    endpoint: str, recipe_path: Path, untrained_artifact: Path
):
    port = endpoint.removesuffix("/v1").rpartition(":")[2]
    settings = [f"artifact={untrained_artifact}", "checkpoints.kd=embedded:slm", f"serving.port={port}"]
    few = [f"{model}.num_cpus=0.1" for model in ("slm", "teacher")]
    statuses: list[int] = []
    is_replaced = threading.Event()

    def ask() -> None:
        body = {"model": "greedy", "messages": [{"role": "user", "content": "3 eggs"}], "max_tokens": 4}
        with httpx.Client(timeout=120) as client:
            while not is_replaced.is_set():
                statuses.append(client.post(f"{endpoint}/chat/completions", json=body).status_code)

    with ThreadPoolExecutor(2) as pool:
        load = [pool.submit(ask) for _ in range(2)]
        try:
            assert app.run(host(load_recipe(recipe_path, settings + few)), blocking=False) == endpoint
        finally:
            is_replaced.set()
        for future in load:
            future.result(120)
    assert len(statuses) > 4
    assert set(statuses) == {200}
