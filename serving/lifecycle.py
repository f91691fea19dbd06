"""The endpoint from its deployment to its end: progress while engines load, and a calm end for what is in flight.

It knows Serve's application by name, and its gateway's methods; nothing of HTTP or models.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

#: The deployment that speaks HTTP.
GATEWAY = "gateway"
#: How often a line says what still loads, where nothing has changed.
SAYS_EVERY_S = 10.0
_LOOKS_EVERY_S = 1.0
_COUNTS_EVERY_S = 0.3
_ANSWERS_WITHIN_S = 5.0
#: What a gateway has sent off may still be on its way through Serve's proxy.
_FLUSH_S = 0.5
_UP = "HEALTHY"


class Loading:
    """Says on stderr which deployments of the application are up and which load, at each change and now and then, while
    the `with` block runs. Lines begin with `command`."""

    def __init__(self, command: str, name: str) -> None:
        self._command, self._name = command, name
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loading", daemon=True)

    def __enter__(self) -> Loading:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if kind is None:  # after Ctrl-C nobody waits for a thread
            self._thread.join()

    def _watch(self) -> None:
        said, when = "", 0.0
        while not self._done.wait(_LOOKS_EVERY_S):
            text, now = self._states(), time.monotonic()
            if text and not self._done.is_set() and (text != said or now - when >= SAYS_EVERY_S):
                said, when = text, now
                print(f"{self._command}: {text}, {now - self._began:.0f} s", file=sys.stderr, flush=True)

    def _states(self) -> str:
        """What loads and what is up; "" where nothing is known, or all is up."""
        states: dict[str, str] = {}
        with contextlib.suppress(RayError, RayServeException, KeyError):  # not there yet, or just ending
            deployments = serve.status().applications[self._name].deployments
            states = {deployment: str(found.status.value) for deployment, found in deployments.items()}
        up = [deployment for deployment, state in states.items() if state == _UP]
        loading = [deployment for deployment in states if deployment not in up]
        if not loading:
            return ""
        return f"loading {', '.join(loading)}" + (f"; up: {', '.join(up)}" if up else "")


class Deployed:
    """An application as it stands when this is made. Whoever deploys it again takes it over: from then on it is not
    drained or deleted by this."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._when = self._deployed_at()

    def delete(self) -> None:
        """Take it down."""
        if self._is_ours():
            serve.delete(self._name)

    def drain(self, seconds: float) -> None:
        """Let no more requests in, and wait for those that it has, `seconds` at most."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RayError, RayServeException, TimeoutError):  # the gateway is gone
            if not self._is_ours():
                return
            self._ask("drain")
            said = False
            while left := sum(count for count in self._ask("in_flight") if isinstance(count, int)):
                if time.monotonic() > deadline:
                    print(f"serve: {left} in flight were not ready in time", file=sys.stderr, flush=True)
                    return
                if not said:
                    again = "Ctrl-C again ends at once"
                    print(f"serve: ending; {left} in flight have {seconds:g} s ({again})", file=sys.stderr, flush=True)
                    said = True
                time.sleep(_COUNTS_EVERY_S)
            time.sleep(_FLUSH_S)

    def _ask(self, method: str) -> list[Any]:
        """What every replica of the gateway answers. Raises DeploymentUnavailableError where there is none."""
        gateway = serve.get_deployment_handle(GATEWAY, self._name)
        if not gateway.is_initialized:
            # This thread has no event loop to run it on, as processes of Serve have (`serving.proxy.ENVIRONMENT`).
            gateway._init(_run_router_in_separate_loop=True)
        deadline = time.monotonic() + _ANSWERS_WITHIN_S
        while True:
            try:
                return gateway.broadcast(method).results(timeout_s=_ANSWERS_WITHIN_S, return_exceptions=True)
            except DeploymentUnavailableError:  # a new handle is told of the replicas a moment later
                if time.monotonic() > deadline:
                    raise
            time.sleep(_COUNTS_EVERY_S)

    def _is_ours(self) -> bool:
        return self._when == self._deployed_at()

    def _deployed_at(self) -> float | None:
        found = serve.status().applications.get(self._name)
        return found.last_deployed_time_s if found else None


def until_stopped(application: Deployed, drain_s: float) -> None:
    """Wait for Ctrl-C or SIGTERM, then until the application has answered what it has, `drain_s` seconds at most. A
    second signal ends at once.

    Returns after SIGTERM, which is how supervisors end a service; after Ctrl-C it ends as commands do
    (`s2t_models.commands`)."""
    stopped = threading.Event()
    interrupt = signal.getsignal(signal.SIGINT)
    was_interrupted = False

    def at_once(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    def first(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        was_interrupted = number == signal.SIGINT
        signal.signal(signal.SIGTERM, at_once)
        if interrupt is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, interrupt)
        stopped.set()

    signal.signal(signal.SIGTERM, first)
    if interrupt is not signal.SIG_IGN:  # the background job of a shell
        signal.signal(signal.SIGINT, first)
    stopped.wait()
    application.drain(drain_s)
    if was_interrupted and callable(interrupt):
        interrupt(signal.SIGINT, None)
