"""Collect and serve with `engine: vllm`, on a real Ray cluster; and what happens where vLLM's processes are killed."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import numpy as np
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `make` installs its CPU build")

from pipelines.collect.job import collect
from pipelines.data.shards import read_shards
from s2t_models.hosting import host
from s2t_models.recipe import Recipe, load_recipe
from serving.app import run_for_job
from serving.keys import Keys

pytestmark = pytest.mark.slow  # eleven engines are started, of which each takes a quarter of a minute
NAME = "vllm"
EXACT = [f"{model}.{key}" for model in ("slm", "teacher") for key in ("dtype=float32", "device=cpu")]
SMALL = [
    "collect.prompts=24",
    "collect.max_new_tokens=60",
    "collect.rollout.batch=2",
    "collect.label.batch=2",
    "collect.rollout.num_cpus=0.5",
    "collect.label.num_cpus=0.5",
    "slm.num_cpus=0.5",
    "teacher.num_cpus=0.5",
]


def recipe(path: Path, *settings: str) -> Recipe:
    return load_recipe(path, [*EXACT, *SMALL, *settings])


def kill_an_engine(within_s: float, is_time: Callable[[], bool] = lambda: True) -> bool:
    """SIGKILL one of vLLM's engine processes under a Ray actor, as soon as it is time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not is_time():
            time.sleep(0.02)
            continue
        for process in psutil.process_iter(["name", "cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if "VLLM::EngineCore" in title and any("ray::" in " ".join(p.cmdline()) for p in process.parents()):
                process.send_signal(signal.SIGKILL)
                return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("writer", ["slm", "s2t"])
def test_a_collection_on_vllm_holds_the_rows_of_the_torch_engines_though_an_engine_is_killed(
    ray_cluster: str, recipe_path: Path, tmp_path: Path, writer: str
) -> None:
    writing = (f"collect.writer={writer}", *(["trigger.threshold=0.1"] if writer == "s2t" else []))
    collect(recipe(recipe_path, *writing), tmp_path / "torch")
    killed = []
    written = tmp_path / "vllm" / "work" / "labelled"
    killer = threading.Thread(target=lambda: killed.append(kill_an_engine(200, lambda: any(written.glob("*")))))
    killer.start()
    collect(recipe(recipe_path, *writing, "slm.engine=vllm", "teacher.engine=vllm"), tmp_path / "vllm")
    killer.join()
    assert killed == [True]
    ours, theirs = (read_shards(tmp_path / name)[0].to_pylist() for name in ("torch", "vllm"))
    same = 0
    for one, other in zip(ours, theirs, strict=True):
        assert (one["uid"], one["error"], other["error"]) == (other["uid"], None, None)
        if one["output_ids"] != other["output_ids"]:
            continue
        same += 1
        np.testing.assert_allclose(one["kl_T"], other["kl_T"], atol=1e-3)
        np.testing.assert_allclose(one["entropy_T"], other["entropy_T"], atol=1e-3)
        assert one["teacher_argmax_T"] == other["teacher_argmax_T"]
    assert same >= 0.98 * len(ours)


def test_a_served_vllm_engine_that_dies_is_replaced_and_no_call_hangs(
    endpoint: str, recipe_path: Path, untrained_artifact: Path
) -> None:
    """The SLM and the artifact on vLLM, the teacher on torch: policies mix them as they like."""
    port = urlparse(endpoint).port
    settings = [f"artifact={untrained_artifact}", f"serving.port={port}", "slm.engine=vllm", "slm.num_cpus=0.1"]
    hosting = host(recipe(recipe_path, *settings))
    url = run_for_job(hosting.only(["slm", "teacher", "s2t-local"]), NAME, Keys(), None, "test")
    bodies = [
        {"model": name, "messages": [{"role": "user", "content": f"What is {i} + 4?"}], "max_tokens": 40, "seed": i}
        for i in range(6)
        for name in ("greedy", "s2t", "s2t-local")
    ]
    try:
        asked_before = asyncio.run(ask_all(url, bodies))
        assert [status for status, _ in asked_before] == [200] * len(bodies)
        texts = [body["choices"][0]["message"]["content"] for _, body in asked_before]

        killed: list[bool] = []
        killer = threading.Thread(target=lambda: killed.append(kill_an_engine(5)))
        killer.start()
        during = asyncio.run(ask_all(url, bodies * 4))
        killer.join()
        assert killed == [True]
        for (status, body), text in zip(during, texts * 4, strict=True):
            if status == 200:
                assert body["choices"][0]["message"]["content"] == text
            else:
                assert (status, body["error"]["code"]) == (503, "engine_unavailable")
        assert texts == asyncio.run(answered_in_the_end(url, bodies))
    finally:
        from ray import serve

        serve.delete(NAME)


async def ask_all(url: str, bodies: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    async with httpx.AsyncClient(timeout=120, trust_env=False) as client:

        async def ask(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            answer = await client.post(f"{url}/chat/completions", json=body)
            return answer.status_code, answer.json()

        return await asyncio.gather(*(ask(body) for body in bodies))


async def answered_in_the_end(url: str, bodies: list[dict[str, Any]]) -> list[str]:
    for _ in range(90):
        answers = await ask_all(url, bodies)
        if all(status == 200 for status, _ in answers):
            return [body["choices"][0]["message"]["content"] for _, body in answers]
        await asyncio.sleep(2)
    raise AssertionError("the engine was not replaced within three minutes")
