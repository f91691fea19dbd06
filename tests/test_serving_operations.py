"""What a deployed endpoint owes its operators: errors in one shape, health that is true, keys, limits, a calm end."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp

from serving.errors import ApiError, failed
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
