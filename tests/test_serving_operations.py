"""What a gateway says to those who run it: health that is true, life, metrics, its own description."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from asgi import ask, error_of
from gateway_alone import Alone
from prometheus_client.parser import text_string_to_metric_families
from reference_engine import card, encode, tiny_pair

from s2t_models.engines.contract import EngineDied, ModelCard, Sampling
from s2t_models.engines.torch import engine as torch_engine
from s2t_models.hosting import host
from s2t_models.recipe import load_recipe
from serving import openai_protocol as api
from serving import readiness


def engine_card() -> ModelCard:
    return ModelCard("slm", "w", "t", 10, 10, (0,))


def test_engines_that_do_not_answer_are_found_out_in_time_and_many_probes_cost_one_call(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(readiness, "ANSWERS_WITHIN_S", 0.05)
    calls: list[str] = []

    async def well() -> ModelCard:
        calls.append("well")
        return engine_card()

    async def hung() -> ModelCard:
        await asyncio.sleep(60)
        raise AssertionError("unreachable")

    async def dead() -> ModelCard:
        raise EngineDied("dead")

    async def probes() -> list[dict[str, ModelCard | None]]:
        asked = readiness.Readiness({"slm": well, "teacher": hung, "kd": dead})
        first = asyncio.create_task(asked.cards())
        await asyncio.sleep(0.01)
        first.cancel()  # a probe that gives up takes nothing from the others
        found = await asyncio.gather(*(asked.cards() for _ in range(20)))
        assert calls == ["well"]
        monkeypatch.setattr(readiness, "FRESH_S", 0.0)
        return [*found, await asked.cards()]

    found = asyncio.run(probes())
    assert all(cards == {"slm": engine_card(), "teacher": None, "kd": None} for cards in found)
    assert calls == ["well", "well"]


@pytest.fixture
def alone(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alone:
    return Alone(host(load_recipe(recipe_path)), monkeypatch)


def chat(**settings: Any) -> dict[str, Any]:
    return {"model": "greedy", "messages": [{"role": "user", "content": "3 eggs"}], "max_tokens": 4} | settings


def test_health_is_that_of_the_engines_and_life_that_of_the_gateway(alone: Alone, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readiness, "ANSWERS_WITHIN_S", 0.05)
    well = ask(alone.app, "/health", "GET")
    assert (well.status_code, well.json()["status"]) == (200, "ok")
    assert well.json()["engines"]["slm"]["weights"] == "w"

    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    alone.handles["teacher"].fault = lambda: asyncio.sleep(60)
    unwell = ask(alone.app, "/health", "GET")
    assert (unwell.status_code, unwell.json()["status"]) == (503, "unavailable")
    assert "no answer from teacher" in unwell.json()["error"]["message"]
    assert set(unwell.json()["engines"]) == {"slm"}
    assert "retry-after" in unwell.headers
    assert ask(alone.app, "/livez", "GET").status_code == 200

    alone.handles["teacher"].fault = None
    assert ask(alone.app, "/health", "GET").status_code == 200
    asyncio.run(alone.gateway.drain())
    assert ask(alone.app, "/health", "GET").json()["status"] == "draining"
    assert error_of(ask(alone.app, json=chat()))["code"] == "shutting_down"
    assert ask(alone.app, "/livez", "GET").status_code == 200


def test_an_engine_that_dies_under_a_request_is_a_503_with_a_time_to_ask_again(alone: Alone):
    async def dies() -> None:
        raise EngineDied("gone")

    assert ask(alone.app, json=chat()).status_code == 200
    alone.handles["slm"].fault = dies
    response = ask(alone.app, json=chat())
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert "retry-after" in response.headers


def test_what_needs_an_engine_that_is_gone_is_refused_at_once_and_the_rest_answered(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(readiness, "ANSWERS_WITHIN_S", 0.05)
    assert ask(alone.app, json=chat(model="llm")).status_code == 200
    alone.handles["teacher"].fault = lambda: asyncio.sleep(60)
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    assert ask(alone.app, "/health", "GET").status_code == 503
    monkeypatch.setattr(readiness, "FRESH_S", 60.0)
    response = ask(alone.app, json=chat(model="llm"))
    assert (response.status_code, error_of(response)["code"]) == (503, "engine_unavailable")
    assert "llm needs teacher, which does not answer" in error_of(response)["message"]
    assert "retry-after" in response.headers
    assert ask(alone.app, json=chat()).status_code == 200


def test_metrics_name_the_policy_that_answered(alone: Alone):
    assert ask(alone.app, json=chat()).status_code == 200
    page = ask(alone.app, "/metrics", "GET")
    assert page.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    answered = [sample.labels for sample in families["s2t_requests"].samples if sample.value]
    assert {"policy": "greedy", "status": "200", "key": "", "replica": "alone"} in answered
    tokens = {(sample.labels["engine"], sample.labels["kind"]): sample for sample in families["s2t_tokens"].samples}
    assert tokens["slm", "decode"].value >= 4
    first = families["s2t_first_token_seconds"].samples
    assert any(sample.name.endswith("_count") and sample.value for sample in first)
    assert families["s2t_waiting"].samples[0].value == 0


def test_an_engine_whose_thread_is_stuck_or_has_ended_is_not_well(monkeypatch: pytest.MonkeyPatch):
    pair, begun, goes_on = tiny_pair(), threading.Event(), threading.Event()
    engine = torch_engine.TorchEngine(pair.slm, card("slm"), slots=2)
    forward = engine._slots.forward

    def stuck(*asked: Any) -> Any:
        begun.set()
        assert goes_on.wait(30)
        return forward(*asked)

    async def decode() -> None:
        monkeypatch.setattr(engine._slots, "forward", stuck)
        call = asyncio.create_task(engine.generate(encode("8+5="), Sampling(max_tokens=2)))
        assert await asyncio.to_thread(begun.wait, 30)
        await engine.check_health()
        monkeypatch.setattr(torch_engine, "STUCK_S", 0.0)
        with pytest.raises(EngineDied, match="slm: calls wait and no forward has ended"):
            await engine.check_health()
        goes_on.set()
        assert len((await call).ids) == 2
        await engine.check_health()  # however long it has had nothing to do

    async def fall_over() -> None:
        monkeypatch.setattr(engine, "_admit_waiting", lambda: 1 / 0)
        call = asyncio.create_task(engine.generate(encode("8+5="), Sampling(max_tokens=2)))
        await asyncio.to_thread(engine._thread.join, 30)
        with pytest.raises(EngineDied, match="thread has ended"):
            await engine.check_health()
        call.cancel()

    asyncio.run(decode())
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    asyncio.run(fall_over())


def test_the_openapi_document_is_true_of_what_is_answered(alone: Alone):
    document = ask(alone.app, "/openapi.json", "GET").json()
    schemas = document["components"]["schemas"]
    assert set(schemas["ChatRequest"]["properties"]) == set(api.ChatRequest.model_fields)
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    posts = [operations["post"] for operations in document["paths"].values() if "post" in operations]
    assert len(posts) >= 3
    assert all("requestBody" in operation for operation in posts)
    assert not [path for path in document["paths"] if "playground" in path]
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/CompletionRequest"}

    def is_documented(path: str, method: str, response: httpx.Response) -> None:
        said = document["paths"][path][method.lower()]["responses"][str(response.status_code)]["content"]
        kind = response.headers["content-type"].split(";")[0]
        if kind == "application/json":
            schema = said[kind]["schema"] | {"components": document["components"]}
            jsonschema.validate(response.json(), schema)
        else:
            assert kind in said

    completion = {"model": "greedy", "prompt": "3 eggs", "max_tokens": 3}
    for path, json_body, status in (
        ("/v1/chat/completions", chat(), 200),
        ("/v1/chat/completions", chat(s2t={"decisions": True}), 200),
        ("/v1/chat/completions", chat(model="none"), 404),
        ("/v1/chat/completions", chat(seed=-2), 400),
        ("/v1/chat/completions", chat(stream=True), 200),
        ("/v1/responses", {"model": "greedy", "input": "3 eggs"}, 200),
        ("/v1/completions", completion, 200),
        ("/v1/completions", completion | {"prompt": []}, 400),
    ):
        response = ask(alone.app, path, json=json_body)
        assert response.status_code == status, response.text
        is_documented(path, "POST", response)
    for path, asked in (
        ("/v1/models", "/v1/models"),
        ("/v1/models/{name}", "/v1/models/maj@3"),
        ("/v1/models/{name}", "/v1/models/none"),
        ("/health", "/health"),
        ("/livez", "/livez"),
        ("/metrics", "/metrics"),
    ):
        is_documented(path, "GET", ask(alone.app, asked, "GET"))
    asyncio.run(alone.gateway.drain())
    is_documented("/health", "GET", ask(alone.app, "/health", "GET"))
    is_documented("/v1/completions", "POST", ask(alone.app, "/v1/completions", json=completion))
