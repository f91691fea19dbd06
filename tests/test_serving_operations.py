"""What a deployed endpoint owes its operators: errors in one shape, health that is true, keys, limits, a calm end."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from gateway_alone import Alone
from prometheus_client.parser import text_string_to_metric_families
from reference_engine import card, encode, tiny_pair
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp

from s2t_models.engines.contract import EngineDied, ModelCard, Sampling
from s2t_models.engines.torch import engine as torch_engine
from s2t_models.hosting import host
from s2t_models.recipe import load_recipe
from s2t_models.settings import ServingSettings
from serving import metrics, readiness
from serving import openai_protocol as api
from serving.errors import ApiError, failed
from serving.front import Rules, ruled
from serving.keys import Keys, KeysError, read_keys
from serving.proxy import ProxyFront


def ask(app: ASGIApp, path: str = "/v1/chat/completions", method: str = "POST", **options: Any) -> httpx.Response:
    """One request to an ASGI application."""

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, which has OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(("status", "is_told"), [(429, True), (503, True), (400, False), (500, False)])
def test_an_error_that_may_pass_says_when_to_ask_again(status: int, is_told: bool):
    response = ask(failed(ApiError(status, "no", retry_after=7)))
    assert response.status_code == status
    assert error_of(response)["message"] == "no"
    assert response.headers.get("retry-after") == ("7" if is_told else None)


def plain(status: int, text: str) -> ASGIApp:
    return PlainTextResponse(text, status_code=status)


async def silent(scope, receive, send):
    """What Serve's proxy does where the gateway's process has ended: nothing."""


@pytest.mark.parametrize(
    ("app", "status", "code"),
    [
        (silent, 503, "gateway_unavailable"),
        (plain(503, "no replica"), 503, "gateway_unavailable"),
        (plain(404, "Path '/v1' not found."), 404, "unknown_url"),
        (plain(408, "Request timed out"), 504, "timeout"),
        (plain(429, "backpressure"), 429, "rate_limit_exceeded"),
        (plain(500, "Internal Server Error"), 500, "internal_error"),
    ],
)
def test_what_the_proxy_says_in_plain_text_becomes_an_openai_error(app: ASGIApp, status: int, code: str):
    response = ask(ProxyFront(app), headers={"x-request-id": "mine"})
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert response.headers["x-request-id"] == "mine"
    assert ("retry-after" in response.headers) is (status in (429, 503))


def test_the_proxy_passes_on_what_a_gateway_answers():
    for app in (JSONResponse({"error": 1}, status_code=503), JSONResponse({"ok": 1}), plain(418, "teapot")):
        assert ask(ProxyFront(app)).content == app.body
    assert ask(ProxyFront(plain(503, "draining")), "/-/healthz", "GET").text == "draining", "Serve's own page"


async def headers_seen(scope, receive, send):
    await JSONResponse(dict(Request(scope).headers))(scope, receive, send)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [(b"abc-123", True), (b"a" * 128, True), (b"a" * 129, False), (b"a b", False), (b"\xff", False), (b"", False)],
)
def test_a_request_has_one_sane_id_whatever_the_client_sends(given: bytes, is_kept: bool):
    steering = [(b"x-request-timeout-seconds", b"0"), (b"x-request-disconnect-disabled", b"?1")]
    headers = [(b"x-request-id", given), *steering]
    seen = ask(ProxyFront(headers_seen), headers=headers).json()
    assert (seen["x-request-id"] == given.decode(errors="replace")) is is_kept
    assert 0 < len(seen["x-request-id"]) <= 128
    assert not [name for name in seen if name.startswith("x-request-") and name != "x-request-id"]
    assert ask(ProxyFront(headers_seen)).json()["x-request-id"] != seen["x-request-id"]


def rules(keys: Keys = Keys(), **settings: Any) -> Rules:  # noqa: B008  # it is immutable
    return Rules(ServingSettings.model_validate(settings), keys)


async def reads(scope, receive, send):
    """Answers with the length of the body."""
    await JSONResponse({"read": len(await Request(scope, receive).body())})(scope, receive, send)


async def in_pieces(size: int):
    for _ in range(size // 1024):
        yield b"x" * 1024


def test_a_body_is_refused_by_what_it_says_of_itself_and_by_what_comes():
    app = ruled(reads, rules(max_body_mb=0.5))
    before = count("s2t_refused_total", reason="body")
    assert ask(app, content=b"x" * 2**19).json() == {"read": 2**19}
    for content in (b"x" * (2**19 + 1), in_pieces(2**20)):
        response = ask(app, content=content)
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        assert "serving.max_body_mb" in error_of(response)["message"]
    assert count("s2t_refused_total", reason="body") == before + 2


def test_no_more_of_a_body_is_read_than_its_limit():
    read = 0

    async def endless():
        nonlocal read
        while True:
            read += 2**16
            yield b"x" * 2**16

    assert ask(ruled(reads, rules(max_body_mb=1)), content=endless()).status_code == 413
    assert read <= 2**20 + 2**17


def test_a_request_that_takes_too_long_is_given_up():
    ended: list[str] = []

    async def slow(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("given up")

    response = ask(ruled(slow, rules(request_timeout_s=0.05)))
    assert response.status_code == 504
    assert error_of(response)["code"] == "timeout"
    assert ended == ["given up"]


def test_an_answer_that_has_begun_is_broken_off_and_not_ended_as_if_it_were_whole():
    async def half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        ask(ruled(half, rules(request_timeout_s=0.05)))


def test_a_gateway_that_drains_lets_nothing_in_and_finishes_what_it_has():
    ruling = rules()
    seen: list[int] = []

    async def app(scope, receive, send):
        seen.append(ruling.traffic.in_flight)
        ruling.traffic.draining = True
        await reads(scope, receive, send)

    ruled_app = ruled(app, ruling)
    assert ask(ruled_app, content=b"abc").json() == {"read": 3}
    refused = ask(ruled_app)
    assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
    assert "retry-after" in refused.headers
    assert ask(ruled_app, "/v1/models", "GET").status_code == 200
    assert (seen, ruling.traffic.in_flight) == ([1, 0], 0)


def count(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


KEY, OTHER = "correct-horse-battery", "another-key-of-another"


def keyed(tmp_path: Path, text: str = f"# staff\nann: {KEY}\n\n bob : {OTHER}\n", environment: str = "") -> Keys:
    (tmp_path / "keys").write_text(text)
    return read_keys(str(tmp_path / "keys"), {"S2T_API_KEYS": environment})


@pytest.mark.parametrize(
    ("headers", "key", "words"),
    [
        ({"Authorization": f"Bearer {KEY}"}, "ann", None),
        ({"Authorization": f"bearer {OTHER}"}, "bob", None),
        ({"Authorization": f"Bearer {KEY}x"}, None, "no such API key"),
        ({"Authorization": f"Basic {KEY}"}, None, "no such API key"),
        ({}, None, "an API key is needed"),
    ],
)
def test_who_has_a_key_may_ask(tmp_path: Path, headers: dict[str, str], key: str | None, words: str | None):
    async def whose(scope, receive, send):
        await JSONResponse(scope["state"]["key"])(scope, receive, send)

    app = ruled(whose, rules(keyed(tmp_path)))
    response = ask(app, headers=headers)
    if key:
        assert response.json() == key
        return
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert words in error_of(response)["message"]
    assert KEY not in response.text
    assert ask(app, "/metrics", "GET", headers=headers).status_code == 401
    for path in ("/health", "/livez", "/openapi.json", "/playground", "/playground/page.js"):
        assert ask(app, path, "GET", headers=headers).status_code == 200
    assert ask(app, "/healthy", "GET", headers=headers).status_code == 401


def test_keys_of_the_environment_stand_beside_those_of_the_file(tmp_path: Path):
    keys = keyed(tmp_path, environment="eve=0123456789abcdef")
    assert [keys.owner(key) for key in (KEY, OTHER, "0123456789abcdef", "", "x")] == ["ann", "bob", "eve", None, None]
    assert not read_keys(None, {})
    assert KEY not in repr(keys)
    assert KEY.encode() not in pickle.dumps(keys)


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("ann: short", "", "keys, line 1: the key of ann has to have 16 or more"),
        ("\nann correct-horse-battery", "", "keys, line 2: a key has a name before it"),
        (f"ann: {KEY}\nann: {OTHER}", "", "keys, line 2: there are two keys of ann"),
        (f"ann: {KEY}", f"ann={OTHER}", "S2T_API_KEYS, key 1: there are two keys of ann"),
        ("", "correct-horse-battery", "S2T_API_KEYS, key 1: a key has a name before it"),
    ],
)
def test_keys_that_are_none_are_refused_without_being_shown(tmp_path: Path, text: str, environment: str, words: str):
    with pytest.raises(KeysError) as error:
        keyed(tmp_path, text, environment)
    assert words in str(error.value)
    assert "horse" not in str(error.value)


def test_a_keys_file_that_cannot_be_read_is_told(tmp_path: Path):
    with pytest.raises(KeysError, match=r"serving.keys_file: .*none cannot be read \(No such file"):
        read_keys(str(tmp_path / "none"), {})


def test_pages_of_other_origins_may_ask_where_the_recipe_names_them(tmp_path: Path):
    origin = {"Origin": "https://a.org"}
    preflight = origin | {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    shut = ruled(reads, rules(keyed(tmp_path)))
    assert "access-control-allow-origin" not in ask(shut, headers=origin).headers
    assert ask(shut, method="OPTIONS", headers=preflight).status_code == 401
    for origins in (["https://a.org"], ["*"]):
        app = ruled(reads, rules(keyed(tmp_path), cors_origins=origins))
        assert ask(app, method="OPTIONS", headers=preflight).status_code == 200
        refused = ask(app, headers=origin)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, origins[0])
    assert "access-control-allow-origin" not in ask(app_for_a(tmp_path), headers={"Origin": "https://b.org"}).headers


def app_for_a(tmp_path: Path) -> ASGIApp:
    return ruled(reads, rules(keyed(tmp_path), cors_origins=["https://a.org"]))


def test_the_access_log_says_who_asked_and_not_what(tmp_path: Path):
    async def app(scope, receive, send):
        scope["state"]["policy"] = "greedy"
        await reads(scope, receive, send)

    path = tmp_path / "logs" / "access.jsonl"
    logged = ruled(app, rules(keyed(tmp_path), access_log=str(path)))
    ask(logged, content="a secret", headers={"Authorization": f"Bearer {KEY}", "x-request-id": "r1"})
    ask(logged, content="a secret", headers={"Authorization": "Bearer nobody's"})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["id"], first["status"], first["policy"], first["key"]) == ("r1", 200, "greedy", "ann")
    assert (second["status"], second["policy"], second["key"]) == (401, "", "")
    assert first["method"] == "POST"
    assert first["path"] == "/v1/chat/completions"
    assert first["seconds"] >= 0
    assert "secret" not in path.read_text()
    assert KEY not in path.read_text()


def test_requests_are_counted_by_policy_status_and_key(tmp_path: Path):
    async def app(scope, receive, send):
        scope["state"]["policy"] = "maj@8"
        await JSONResponse({}, status_code=429)(scope, receive, send)

    labels = {"policy": "maj@8", "status": "429", "key": "ann"}
    before = count("s2t_requests_total", **labels)
    ask(ruled(app, rules(keyed(tmp_path))), headers={"Authorization": f"Bearer {KEY}"})
    assert count("s2t_requests_total", **labels) == before + 1
    assert count("s2t_request_seconds_count", policy="maj@8") >= 1
    assert count("s2t_in_flight") == 0


def test_what_answers_cost_is_counted_and_the_replicas_are_told_apart():
    metrics.observe_decode("s2t", {"slm": {"prefill": 3, "decode": 5, "leaves": 8, "forwards": 9}}, 4, 1)
    metrics.observe_first_token("s2t", 0.2)
    metrics.refused("busy")
    counted = metrics.counted()
    page = metrics.page({"a": counted, "b": counted}).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert set(families) >= {"s2t_requests", "s2t_request_seconds", "s2t_first_token_seconds", "s2t_in_flight"}
    written = [sample for sample in families["s2t_tokens"].samples if sample.labels["kind"] == "decode"]
    assert [(sample.labels["replica"], sample.value) for sample in written] == [("a", 5), ("b", 5)]
    assert {sample.labels["replica"] for sample in families["s2t_rescues"].samples} == {"a", "b"}
    assert "_created" not in page
    assert page.count("# TYPE s2t_tokens_total counter") == 1


def test_names_without_end_do_not_make_series_without_end():
    for number in range(metrics.MOST_POLICIES + 50):
        metrics.observe_first_token(f"s2t@0.{number}", 0.1)
    samples = next(family for family in metrics.counted() if family.name == "s2t_first_token_seconds").samples
    assert len({sample.labels["policy"] for sample in samples}) <= metrics.MOST_POLICIES + 1
    assert count("s2t_first_token_seconds_count", policy="other") >= 50


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


def test_metrics_name_the_policy_that_answered(alone: Alone):
    assert ask(alone.app, json=chat()).status_code == 200
    page = ask(alone.app, "/metrics", "GET")
    assert page.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(page.text)}
    answered = [sample.labels for sample in families["s2t_requests"].samples if sample.value]
    assert {"policy": "greedy", "status": "200", "key": "", "replica": "alone"} in answered


def test_an_engine_whose_thread_is_stuck_or_has_ended_is_not_well(monkeypatch: pytest.MonkeyPatch):
    pair, begun, goes_on = tiny_pair(), threading.Event(), threading.Event()
    engine = torch_engine.TorchEngine(pair.slm, card("slm"), slots=2)
    forward = engine._slots.forward

    def stuck(queries: Any) -> Any:
        begun.set()
        assert goes_on.wait(30)
        return forward(queries)

    async def decode() -> None:
        monkeypatch.setattr(engine._slots, "forward", stuck)
        call = asyncio.create_task(engine.generate(encode("8+5="), Sampling(max_tokens=2)))
        await asyncio.to_thread(begun.wait, 30)
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
        ("/v1/chat/completions", chat(seed=-1), 400),
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
