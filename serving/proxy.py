"""What stands in Serve's own proxy, before any gateway: sane headers in, OpenAI-shaped errors out.

Where a gateway dies, or none is there, Serve's proxy answers for it in plain text, or with nothing at all. `s2t serve`
has the proxies that it starts call `middlewares`; on a cluster whose Serve runs already, set `ENVIRONMENT` where Ray
starts. It imports no models: the proxy is a small process.
"""

from __future__ import annotations

import contextlib
import uuid

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import ApiError, failed

#: For the process of Serve's controller, whose children the proxies are. A replica that does not answer its health
#: checks will not answer a request to stop either: it is killed at once, and what waits for it fails. A proxy has time
#: to start where the machine is busy: Serve's own five seconds are for one that waits for it already.
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy:middlewares",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
REQUEST_ID = b"x-request-id"
#: Headers by which a client could lift Serve's limits on its own request.
STEERING = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled"}
LONGEST_ID = 128
#: Serve's own pages, such as /-/healthz.
OWN = "/-/"
#: The statuses that Serve gives in plain text: without a gateway, or around one that raised.
PLAIN = {404, 408, 429, 500, 503}


def middlewares() -> list[Middleware]:
    """Serve's proxy calls this when it starts."""
    return [Middleware(ProxyFront)]


def request_id(given: bytes | None) -> str:
    """The client's own id of its request where it is sane: printable ASCII without spaces, LONGEST_ID characters at
    most; else one made here."""
    with contextlib.suppress(UnicodeDecodeError, AttributeError):
        text = given.decode("ascii")  # type: ignore[union-attr]
        if 0 < len(text) <= LONGEST_ID and all(" " < character <= "~" for character in text):
            return text
    return uuid.uuid4().hex


class ProxyFront:
    """ASGI middleware for Serve's proxy. Every request has one sane `x-request-id`, which Serve gives back with the
    answer. An error that is not JSON becomes one in OpenAI's shape, and so does no answer at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN):
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        name = request_id(next((value for key, value in headers if key == REQUEST_ID), None))
        kept = [(key, value) for key, value in headers if key != REQUEST_ID and key not in STEERING]
        scope = {**scope, "headers": [*kept, (REQUEST_ID, name.encode())]}
        answer = _Answer(send)
        await self._app(scope, receive, answer.pass_on)
        if not answer.begun:
            await failed(_of(answer.status, name))(scope, receive, send)


class _Answer:
    """What the proxy sends: passed on, but for its plain errors, of which `status` is kept; None: nothing has come."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False
        self.status: int | None = None

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = Headers(raw=message["headers"]).get("content-type", "")
            self.status = message["status"]
            self.begun = message["status"] not in PLAIN or kind.startswith("application/json")
        if self.begun:
            await self._send(message)


def _of(status: int | None, name: str) -> ApiError:
    """What a plain error of Serve's proxy means to a client."""
    headers = {"x-request-id": name}
    if status == 404:
        message = "nothing is served at this address, or not yet"
        return ApiError(404, message, code="unknown_url", headers=headers)
    if status == 408:
        message = "the answer was not ready in time"
        return ApiError(504, message, kind="server_error", code="timeout", headers=headers)
    if status == 429:
        message = "too many requests wait for this endpoint; try again"
        return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)
    if status == 500:
        return ApiError(500, "internal error", kind="server_error", code="internal_error", headers=headers)
    message = "the gateway that had this request has ended, or none is there just now; try again"
    return ApiError(503, message, kind="server_error", code="gateway_unavailable", headers=headers)
