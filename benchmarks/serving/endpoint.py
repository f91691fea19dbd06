"""The endpoint as a child process, and what its processes take: CPU and memory by what each of them is."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from types import TracebackType

import httpx
import psutil

from s2t_models.errors import UserError

READY_WITHIN_S = 300.0
ENDS_WITHIN_S = 60.0
#: Processes by their titles, in the order of the tables; a replica goes by its deployment.
KINDS = {"ProxyActor": "proxy", "ServeController": "controller"}
#: Ray's own (node manager, store, dashboard, workers that wait) and `s2t serve` itself, which waits too.
RAY = "Ray"
GATEWAY = "gateway"
_REPLICA = re.compile(r"ServeReplica:[^:]+:([^.\s]+)")

Seconds = dict[tuple[str, int], float]


class EndpointFailed(UserError):
    """The endpoint does not come up."""


class Processes:
    """The processes of the session that the process `leader` heads, by what they are: "proxy", "gateway", "controller",
    an engine's name, or "Ray"."""

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def by_kind(self) -> dict[str, list[psutil.Process]]:
        found = defaultdict(list)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self._leader:
                    found[_kind(process)].append(process)
        return dict(found)

    def cpu(self) -> Seconds:
        """User and system seconds so far of each (kind, process id)."""
        seconds: Seconds = {}
        for kind, processes in self.by_kind().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    seconds[kind, process.pid] = times.user + times.system
        return seconds

    def memory(self) -> dict[str, int]:
        """Resident bytes by kind."""
        sizes: dict[str, int] = defaultdict(int)
        for kind, processes in self.by_kind().items():
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    sizes[kind] += process.memory_info().rss
        return dict(sizes)

    def replicas(self, engines: Collection[str]) -> list[psutil.Process]:
        """Those of the engines."""
        return [process for kind, found in self.by_kind().items() if kind in engines for process in found]


def spent(before: Seconds, after: Seconds) -> dict[str, float]:
    """CPU seconds by kind between two looks; a process that has come meanwhile counts from its start."""
    seconds: dict[str, float] = defaultdict(float)
    for (kind, pid), value in after.items():
        # The title of a replica that starts changes its kind.
        known = next((before[key] for key in before if key[1] == pid), 0.0)
        seconds[kind] += value - known
    return dict(seconds)


def _kind(process: psutil.Process) -> str:
    """That of the process, or of the nearest one above it: vLLM's engines have processes of their own."""
    for one in (process, *process.parents()):
        title = " ".join(one.cmdline())
        if replica := _REPLICA.search(title):
            return replica[1]
        for part, kind in KINDS.items():
            if part in title:
                return kind
    return RAY


#: What is served: a recipe, or an endpoint that does nothing.
RECIPE, NOTHING = "serving.app", "benchmarks.serving.empty"


class ServedEndpoint:
    """A recipe, or NOTHING, served on a free port while the `with` block runs, at the head of a session of its own.
    Raises EndpointFailed."""

    def __init__(self, recipe: str, settings: Sequence[str], module: str = RECIPE) -> None:
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self._command = [sys.executable, "-m", module, "--recipe", recipe]
        for setting in [*settings, f"serving.port={self._port}"]:
            self._command += ["--set", setting]

    def __enter__(self) -> ServedEndpoint:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        # Its stderr says what loads.
        self._process = subprocess.Popen(
            self._command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self.processes = Processes(self._process.pid)
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def engines(self) -> list[str]:
        """The names of its engines."""
        return list(self._ask("/health").json()["engines"])

    def offers(self, policy: str) -> bool:
        return self._ask(f"/v1/models/{policy}").is_success

    def _ask(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self._port}{path}", timeout=60, trust_env=False)

    def _wait(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            if self._process.poll() is not None:
                raise EndpointFailed("the endpoint has ended; what it said is above")
            with contextlib.suppress(httpx.HTTPError):
                if self._ask("/health").is_success:
                    return
            if time.monotonic() > deadline:
                raise EndpointFailed(f"the endpoint is not ready after {READY_WITHIN_S:g} s")
            time.sleep(0.5)

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            for processes in self.processes.by_kind().values():
                for process in processes:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
            self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
