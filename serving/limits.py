"""Whether a request is let in at a gateway, by its key, and what it may take: the size of its body, and its time.

ASGI middlewares, each of one limit. They know nothing of models or policies.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import metrics, room
from serving.admission import Admission
from serving.errors import ApiError, failed
from serving.keys import Keys
from serving.room import Room

MB = 1024**2
#: As many of a number as tell that it is too large.
_DIGITS = 18
#: What is answered without a key: probes cannot hold one, and the rest tells nothing of anyone. The page's own requests
#: need a key as all do.
OPEN = ("/health", "/livez", "/openapi.json", "/playground")
#: What a client is told to wait where this server is ending: another may have taken its place.
AFTER_DRAINING_S = 10


@dataclass
class Traffic:
    """The requests of one gateway that decode something: how many there are, how many of these have no answer yet, and
    whether more are let in."""

    in_flight: int = 0
    unanswered: int = 0
    draining: bool = False


class Started:
    """Whether a response has begun: an error cannot take its place any more."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False

    async def send(self, message: Message) -> None:
        self.begun = True
        await self._send(message)


class KeyCheck:
    """Lets in who has a key (401 to others), and notes the key's name as `key` in the request's state."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._keys or is_open(scope):
            await self._app(scope, receive, send)
            return
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self._keys.owner(key.strip()) if kind.lower() == "bearer" else None
        if name is None:
            metrics.refused("key")
            message = "no such API key" if key else "an API key is needed: send it as Authorization: Bearer KEY"
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await failed(error)(scope, receive, send)
            return
        scope["state"]["key"] = name
        await self._app(scope, receive, send)


def is_open(scope: Scope) -> bool:
    """Whether the path needs no key."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return any(path == open_path or path.startswith(f"{open_path}/") for open_path in OPEN)


class BodyTooLarge(ApiError):
    """Raised into who reads the body, and answered here where it comes back."""

    def __init__(self, megabytes: float) -> None:
        message = f"the body is larger than {megabytes:g} MB (serving.max_body_mb)"
        super().__init__(413, message, code="body_too_large")
        metrics.refused("body")


class BodyLimit:
    """Refuses a body of more than `megabytes` (413), by what its header says, else by counting as it comes in."""

    def __init__(self, app: ASGIApp, megabytes: float) -> None:
        self._app, self._megabytes, self._limit = app, megabytes, int(megabytes * MB)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise BodyTooLarge(self._megabytes)
            return message

        started = Started(send)
        announced = Headers(scope=scope).get("content-length", "")
        try:
            if announced.isdecimal() and int(announced[:_DIGITS]) > self._limit:
                raise BodyTooLarge(self._megabytes)
            await self._app(scope, counted, started.send)
        except BodyTooLarge as error:
            if started.begun:
                raise
            await failed(error)(scope, receive, send)


class TimeLimit:
    """Ends a request that takes more than `seconds`: 504, or the connection where the answer has begun."""

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = Started(send)
        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._app(scope, receive, started.send)
        except TimeoutError:
            if started.begun or not limit.expired():
                raise
            message = f"the answer was not ready within {self._seconds:g} s (serving.request_timeout_s)"
            error = ApiError(504, message, kind="server_error", code="timeout")
            await failed(error)(scope, receive, send)


class Door:
    """Counts the requests that decode, and lets no more of them in once the gateway drains (503). Each answer says how
    many requests the gateway has room for (`serving.room`); there are `gateways` at the most."""

    def __init__(self, app: ASGIApp, traffic: Traffic, admission: Admission, gateways: int) -> None:
        self._app, self._traffic, self._admission = app, traffic, admission
        self._name, self._gateways = uuid.uuid4().hex, gateways

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._traffic.draining:
            metrics.refused("draining")
            message = "this server is ending and takes no more requests; try again"
            error = ApiError(503, message, kind="server_error", code="shutting_down", retry_after=AFTER_DRAINING_S)
            await failed(error)(scope, receive, send)
            return
        is_answered = False

        def note_answer() -> None:
            nonlocal is_answered
            self._traffic.unanswered -= not is_answered
            is_answered = True

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                note_answer()
                message = {**message, "headers": [*message["headers"], (room.HEADER, self._room().written())]}
            await send(message)

        self._traffic.in_flight += 1
        self._traffic.unanswered += 1
        try:
            with metrics.in_flight.track_inprogress():
                await self._app(scope, receive, told)
        finally:
            note_answer()
            self._traffic.in_flight -= 1

    def _room(self) -> Room:
        limit = self._admission.limit(self._traffic.unanswered)
        return Room(self._name, self._gateways, limit, self._admission.retry_after)
