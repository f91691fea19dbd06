"""Requests to ASGI applications in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from starlette.types import ASGIApp


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
