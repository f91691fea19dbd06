"""What a request goes through before it is read: the proxy's front, limits, keys, origins; what is counted and logged
of it."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from asgi import ask, error_of
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp

from s2t_models.engines.contract import Decision, Usage
from s2t_models.settings import ServingSettings
from serving import metrics
from serving.admission import Admission
from serving.app import _cautions
from serving.decoding import Ended, Piece
from serving.errors import ApiError, failed
from serving.front import Rules, note_policy, ruled
from serving.keys import Keys, KeysError, new_key, read_keys
from serving.measuring import measured
from serving.proxy import ProxyFront


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
    return Rules(ServingSettings.model_validate(settings), keys, Admission({"slm": 1}, 1))


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
        note_policy("greedy")
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
        note_policy("maj@8")
        await JSONResponse({}, status_code=429)(scope, receive, send)

    labels = {"policy": "maj@8", "status": "429", "key": "ann"}
    before = count("s2t_requests_total", **labels)
    ask(ruled(app, rules(keyed(tmp_path))), headers={"Authorization": f"Bearer {KEY}"})
    assert count("s2t_requests_total", **labels) == before + 1
    assert count("s2t_request_seconds_count", policy="maj@8") >= 1
    assert count("s2t_in_flight") == 0


def test_what_answers_cost_is_counted_and_the_replicas_are_told_apart():
    metrics.observe_decode("s2t", {"counted": {"prefill": 3, "decode": 5, "leaves": 8, "forwards": 9}}, 4, 1)
    metrics.observe_first_token("s2t", 0.2)
    metrics.refused("busy")
    counted = metrics.counted()
    page = metrics.page({"a": counted, "b": counted}).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert set(families) >= {"s2t_requests", "s2t_request_seconds", "s2t_first_token_seconds", "s2t_in_flight"}
    tokens = [sample for sample in families["s2t_tokens"].samples if sample.labels["engine"] == "counted"]
    written = [(sample.labels["replica"], sample.value) for sample in tokens if sample.labels["kind"] == "decode"]
    assert written == [("a", 5), ("b", 5)]
    assert {sample.labels["replica"] for sample in families["s2t_rescues"].samples} == {"a", "b"}
    assert "_created" not in page
    assert page.count("# TYPE s2t_tokens_total counter") == 1


def test_names_without_end_do_not_make_series_without_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_policies", set())
    monkeypatch.setattr(metrics, "MOST_POLICIES", 5)
    for number in range(50):
        metrics.observe_first_token(f"s2t@0.9{number}", 0.1)
    samples = next(family for family in metrics.counted() if family.name == "s2t_first_token_seconds").samples
    assert len({name for sample in samples if (name := sample.labels["policy"]).startswith("s2t@0.9")}) == 5
    assert count("s2t_first_token_seconds_count", policy="other") == 45


def test_whoever_serves_for_others_is_told_what_that_takes(tmp_path: Path):
    def cautions(keys: Keys, **settings: Any) -> list[str]:
        return list(_cautions(ServingSettings.model_validate(settings), keys))

    keys, file = keyed(tmp_path), tmp_path / "keys"
    for host_name, is_told in (("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)):
        assert bool(cautions(Keys(), host=host_name)) is is_told
        assert not cautions(keys, host=host_name)
    file.chmod(0o644)
    (told,) = cautions(keys, keys_file=str(file))
    assert told.endswith("chmod 600 it")
    file.chmod(0o600)
    assert not cautions(keys, keys_file=str(file))
    assert new_key("job")[0].owner(new_key("job")[1]) is None, "each is another"


def test_decisions_and_rescues_are_counted_as_an_answers_pieces_pass():
    def decision(chosen: int) -> Decision:
        return Decision(0, 1.0, [7, 8], [-2.0, -0.5], [0.5, 0.5], [0.5, 0.5], chosen)

    async def pieces():
        yield Piece(0, "a", [8], decisions=[decision(8), decision(7)])
        yield Piece(0, "b", [7], decisions=[decision(7)])
        yield Ended(0, "length", {"slm": Usage(decode=2)}, [])

    async def passed() -> list[Piece | Ended]:
        return [piece async for piece in measured("takeover@0.3", 0.0, pieces())]

    assert len(asyncio.run(passed())) == 3
    assert count("s2t_decisions_total", policy="takeover@0.3") == 3
    assert count("s2t_rescues_total", policy="takeover@0.3") == 2
    assert count("s2t_first_token_seconds_count", policy="takeover@0.3") == 1
