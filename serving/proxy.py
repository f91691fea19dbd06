"""What stands in Serve's own proxy, before any gateway: sane headers in, OpenAI-shaped errors out, and a quick refusal
of what no gateway has room for.

Where a gateway dies, or none is there, Serve's proxy answers for it in plain text, or with nothing at all. `s2t serve`
has the proxies that it starts call `middlewares`; on a cluster whose Serve runs already, set `ENVIRONMENT` where Ray
starts. It imports no models: the proxy is a small process.
"""

from __future__ import annotations

import contextlib
import re
import uuid

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import room
from serving.errors import ApiError, failed, overloaded
from serving.room import Room, Rooms

#: For the process of Serve's controller, whose children the proxies and replicas are. A replica that does not answer
#: its health checks will not answer a request to stop either: it is killed at once, and what waits for it fails. A
#: proxy has time to start where the machine is busy: Serve's own five seconds are for one that waits for it already.
#: Gateways are asked evenly, wherever they are: each has its part of the engines' places, and a proxy that asks those
#: of its own node leaves the others' unused. The rest is for speed: gRPC between proxies and gateways, and one event
#: loop a process instead of two or three.
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.proxy:middlewares",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",
    "RAY_SERVE_PROXY_PREFER_LOCAL_AZ_ROUTING": "0",
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
REQUEST_ID = b"x-request-id"
#: Headers by which a client could lift Serve's limits on its own request, or count refusals that were none.
STEERING = {b"x-request-timeout-seconds", b"x-request-disconnect-disabled", room.REFUSED}
LONGEST_ID = 128
#: Serve's own pages, such as /-/healthz.
OWN = "/-/"
#: A request of an application, which answers below its prefix: what decodes is below /v1, and /metrics counts.
OF_APPLICATION = re.compile(r"(.*?)/(v1/.*|metrics)")
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
    answer. An error that is not JSON becomes one in OpenAI's shape, and so does no answer at all. A POST that no
    gateway of its application has room for gets a 429 unread."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._rooms: dict[str, Rooms] = {}  # by the prefix of an application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN):
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        name = request_id(next((value for key, value in headers if key == REQUEST_ID), None))
        kept = [(key, value) for key, value in headers if key != REQUEST_ID and key not in STEERING]
        rooms, decodes = self._rooms_of(scope["path"]), scope["method"] == "POST"
        # What a page of another origin may read of a refusal, gateways say.
        if decodes and (full := rooms.full()) and not any(key == b"origin" for key, _ in kept):
            rooms.refused += 1
            await failed(overloaded(full.retry_after, {"x-request-id": name}))(scope, receive, send)
            return
        if rooms.refused:
            kept.append((room.REFUSED, str(rooms.refused).encode()))
            rooms.refused = 0
        answer = _Answer(send, rooms, decodes)
        try:
            await self._app({**scope, "headers": [*kept, (REQUEST_ID, name.encode())]}, receive, answer.pass_on)
        finally:
            answer.end()
        if not answer.begun:
            await failed(_of(answer.status, name))(scope, receive, send)

    def _rooms_of(self, path: str) -> Rooms:
        """Those of the application that the path is of."""
        found = OF_APPLICATION.fullmatch(path)
        if not found:
            return Rooms()
        if found[1] not in self._rooms:
            self._rooms = {prefix: rooms for prefix, rooms in self._rooms.items() if rooms.unanswered or rooms.refused}
            self._rooms[found[1]] = Rooms()
        return self._rooms[found[1]]


class _Answer:
    """What the proxy sends: passed on, but for its plain errors, of which `status` is kept, and for what a gateway says
    of its room. `status` is None where nothing has come. A request that `decodes` counts until its answer begins."""

    def __init__(self, send: Send, rooms: Rooms, decodes: bool) -> None:
        self._send, self._rooms, self._is_counted = send, rooms, decodes
        self.begun = False
        self.status: int | None = None
        self._streams: str | None = None  # the name of the gateway that does
        rooms.unanswered += decodes

    async def pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = message["headers"]
            kind = Headers(raw=headers).get("content-type", "")
            self._count()
            for said in [Room.read(value) for key, value in headers if key == room.HEADER]:
                self._rooms.note(said)
                self._streams = said.gateway if kind.startswith("text/event-stream") else None
            message = {**message, "headers": [(key, value) for key, value in headers if key != room.HEADER]}
            self.status = message["status"]
            self.begun = message["status"] not in PLAIN or kind.startswith("application/json")
        if self.begun:
            await self._send(message)

    def end(self) -> None:
        """Nothing more comes."""
        self._count()
        if self._streams is not None:
            self._rooms.note_end(self._streams)

    def _count(self) -> None:
        self._rooms.unanswered -= self._is_counted
        self._is_counted = False


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
