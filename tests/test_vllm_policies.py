"""Every policy on either engine: the embedded pair in float32 behind vLLM's engines and the torch ones, text by text.

The arithmetic of the two is not the same to the last bit, so where the first tokens that differ are a near-tie, the
texts may differ from there on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `make` installs its CPU build")

from s2t_models import chat, loading
from s2t_models.engines.contract import Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import Hosting, host
from s2t_models.policies import offer
from s2t_models.policies.base import Decoded, Engines, Request, gather
from s2t_models.recipe import load_recipe

POLICIES = ("greedy", "sample", "takeover", "s2t", "s2t-entropy", "s2t-local", "s2t-local-kl")
PROMPTS = (30, pytest.param(200, marks=pytest.mark.slow))
MOST_DIFFERENT = 0.02
NEAR_TIE = 1e-3
LENGTH = 80


@pytest.fixture(scope="module")
def hosting(recipe_path: Any, untrained_artifact: Any) -> Hosting:
    exact = [f"{model}.{key}" for model in ("slm", "teacher") for key in ("dtype=float32", "device=cpu")]
    return host(load_recipe(recipe_path, [f"artifact={untrained_artifact}", *exact]))


@contextmanager
def running(hosting: Hosting, engine: str) -> Iterator[Engines]:
    tokenizer = loading.load_tokenizer(hosting.tokenizer)
    with ExitStack() as closing:
        engines = {}
        for name, hosted in hosting.engines.items():
            engines[name] = load(
                replace(hosted, settings=hosted.settings.model_copy(update={"engine": engine, "slots": 32}))
            )
            closing.callback(engines[name].close)
        yield Engines(engines, tokenizer.decode, tokenizer.encode)


@pytest.fixture(scope="module")
def torch_pair(hosting: Hosting) -> Iterator[Engines]:
    with running(hosting, "torch") as engines:
        yield engines


@pytest.fixture(scope="module")
def vllm_pair(hosting: Hosting, environment_put_back: None) -> Iterator[Engines]:
    with running(hosting, "vllm") as engines:
        yield engines


def prompts(hosting: Hosting, count: int) -> list[list[int]]:
    from pipelines.tasks import load as load_task

    _, items = load_task("embedded", None)
    tokenizer = loading.load_tokenizer(hosting.tokenizer)
    return [chat.prompt_ids(tokenizer, item.prompt) for item in items[:count]]


def decode_all(policy: Any, engines: Engines, asked: list[list[int]]) -> list[Decoded]:
    async def all_at_once() -> list[Decoded]:
        requests = [Request(prompt, LENGTH, seed=i) for i, prompt in enumerate(asked)]
        return await asyncio.gather(*(gather(policy.decode(engines, request)) for request in requests))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("count", PROMPTS)
@pytest.mark.parametrize("name", POLICIES)
def test_texts_are_the_torch_engines(hosting, torch_pair, vllm_pair, name, count):
    policy, asked = offer(hosting)[0][name], prompts(hosting, count)
    ours, theirs = decode_all(policy, torch_pair, asked), decode_all(policy, vllm_pair, asked)
    gaps = [
        gap(prompt, one.ids, other.ids, torch_pair)
        for prompt, one, other in zip(asked, ours, theirs, strict=True)
        if one.ids != other.ids
    ]
    assert len(gaps) <= max(1, MOST_DIFFERENT * count)
    assert all(nats < NEAR_TIE for nats in gaps), gaps


def gap(prompt: list[int], one: list[int], other: list[int], engines: Engines) -> float:
    """How far apart the two tokens are, in nats, where two texts first differ."""
    at = next(t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    state = prompt + one[:at]
    logprobs_N = asyncio.run(engines["slm"].score(state, len(state), np.array([[one[at], other[at]]]))).logprobs_TN[0]
    return abs(float(logprobs_N[0] - logprobs_N[1]))


def test_what_a_vllm_engine_cannot_do_is_refused_with_the_reason(hosting):
    slm = hosting.engines["slm"]
    there = replace(hosting, engines={**hosting.engines, "slm": replace(slm, settings=_vllm(slm.settings))})
    refused = offer(there)[1]
    assert refused["multiplex"] == "multiplex needs multiplex of slm, which a vllm engine does not have here"
    assert {"greedy", "s2t", "takeover"} <= offer(there)[0].keys()


def _vllm(settings: Any) -> Any:
    return settings.model_copy(update={"engine": "vllm"})


def test_a_cancelled_call_leaves_nothing_behind(vllm_pair, hosting):
    engine, prompt = vllm_pair["slm"], prompts(hosting, 1)[0]

    async def cancelled() -> int:
        calls = [
            asyncio.ensure_future(engine.generate(prompt, Sampling(200, temperature=2.0, seed=i))) for i in range(8)
        ]
        await asyncio.sleep(0.05)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.2)
        return engine._llm.get_num_unfinished_requests()

    assert asyncio.run(cancelled()) == 0
