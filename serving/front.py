"""What every request of a gateway goes through before it is read: measured, allowed, bounded.

`Front` is the one middleware of the gateway's application. What it goes by belongs to the recipe, so it is put together
when the replica has it.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import serve
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from s2t_models.settings import ServingSettings
from serving import metrics, room
from serving.admission import Admission
from serving.keys import Keys
from serving.limits import BodyLimit, Door, KeyCheck, TimeLimit, Traffic
from serving.placement import gateways

#: The status of a request whose client went away, as proxies log it.
CLIENT_GONE = 499
#: What is known of the request at hand: its `policy` and `key`.
_about: ContextVar[dict[str, Any]] = ContextVar("about")


_arrived: ContextVar[float] = ContextVar("arrived")


def arrived() -> float:
    """When the request at hand came, by `time.perf_counter`."""
    return _arrived.get()


def note_policy(name: str) -> None:
    """Say which policy answers the request at hand, for its count and its line in the log."""
    _about.get()["policy"] = name


@dataclass
class Rules:
    """What the front of one gateway goes by."""

    settings: ServingSettings
    keys: Keys
    admission: Admission
    traffic: Traffic = field(default_factory=Traffic)


class Front:
    """The middleware of the gateway's application: what it goes by are the served object's `rules`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._ruled: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._ruled is None:
            gateway: Any = serve.get_replica_context().servable_object
            self._ruled = ruled(self._app, gateway.rules)
        await self._ruled(scope, receive, send)


def ruled(app: ASGIApp, rules: Rules) -> ASGIApp:
    """The application behind its limits; the last one named here is the first that a request meets."""
    settings = rules.settings
    app = BodyLimit(app, settings.max_body_mb)
    app = TimeLimit(app, settings.request_timeout_s)
    app = Door(app, rules.traffic, rules.admission, gateways(settings))
    app = KeyCheck(app, rules.keys)
    if settings.cors_origins:
        # Outside of the keys: a browser asks first without one, and may read a refusal.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return Observed(app, AccessLog(settings.access_log) if settings.access_log else None)


class AccessLog:
    """A file of JSON lines, one a request. It holds neither what was asked nor keys, only their names."""

    def __init__(self, path: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Line by line and at its end: several replicas of a node may share it.
        self._file = Path(path).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def write(self, entry: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now} | entry) + "\n")


class Observed:
    """Counts and logs each request when it ends."""

    def __init__(self, app: ASGIApp, log: AccessLog | None) -> None:
        self._app, self._log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope["state"] = {**scope.get("state", {}), "policy": "", "key": ""}
        began = time.perf_counter()
        metrics.refused("full", room.refused(Headers(scope=scope)))
        _about.set(state)
        _arrived.set(began)
        status, written = 500, 0

        async def noted(message: Message) -> None:
            nonlocal status, written
            status = message.get("status", status)
            written += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            raise
        finally:
            seconds = time.perf_counter() - began
            metrics.observe_request(state["policy"], state["key"], status, seconds)
            if self._log:
                self._log.write(
                    {
                        "id": Headers(scope=scope).get("x-request-id"),
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "seconds": round(seconds, 4),
                        "bytes": written,
                        "policy": state["policy"],
                        "key": state["key"],
                    }
                )
