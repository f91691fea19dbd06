"""Errors as answers in OpenAI's shape, and when to ask again. It knows neither models nor requests."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse

#: What a client is told to wait, in seconds, where an error may pass and nobody knows when.
RETRY_AFTER_S = 2


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape. `retry_after` (seconds) goes with statuses that may pass, 429 and
    503; further `headers` go as they are."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int = RETRY_AFTER_S,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        may_pass = status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
        self.headers = ({"Retry-After": str(retry_after)} if may_pass else {}) | (headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def overloaded(retry_after: int, headers: dict[str, str] | None = None) -> ApiError:
    """What one more request gets where too many wait: to come again after so many seconds."""
    message = f"too many requests are waiting here; try again in {retry_after} s"
    return ApiError(429, message, kind="overloaded", code="overloaded", retry_after=retry_after, headers=headers)


def failed(error: ApiError) -> JSONResponse:
    """The error as a response, which is an ASGI application too."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)
