"""Algebraic equality by math-verify, in worker processes that are killed when they take too long.

A small pool of persistent processes (`algebra_child`), fed one question at a time through pipes. A worker that uses up
its CPU time, misses the deadline or dies is killed and replaced; the question then counts as not equal. CPU time, so
that a verdict does not hang on how busy the machine is.
"""

from __future__ import annotations

import atexit
import json
import queue
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

_CHILD = Path(__file__).with_name("algebra_child.py")
_WALL_SECONDS = 120.0  # for a worker that neither answers nor uses its CPU time


class _Worker:
    """One process and its pipes. Used by one thread at a time."""

    def __init__(self, cpu_seconds: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(_CHILD), str(cpu_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.selector = selectors.DefaultSelector()
        assert self.process.stdout is not None
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def ask(self, request: dict[str, object]) -> bool | None:
        """The worker's answer, or None where it missed its deadline or died; it is then of no more use."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        deadline = time.monotonic() + _WALL_SECONDS
        line = b""
        while not line.endswith(b"\n"):
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = self.process.stdout.read1(65536)  # type: ignore[attr-defined]
            if not chunk:
                return None
            line += chunk
        return bool(json.loads(line)["equal"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # a question that a dead worker did not read
                pipe.close()


class Algebra:
    """A pool of math-verify workers; safe to call from several threads. Close it, or let the interpreter's end do so.

    Args:
        workers: processes, started when first needed.
        cpu_seconds: how much CPU time one question may take.
    """

    def __init__(self, workers: int = 2, cpu_seconds: float = 5.0) -> None:
        self.cpu_seconds = cpu_seconds
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._answers: dict[tuple[str, str, float | None], bool] = {}
        self._lock = threading.Lock()
        self.timeouts = 0

    def equal(self, gold: str, pred: str, tolerance: float | None = None) -> bool:
        """Whether the LaTeX expressions are equal; `tolerance` is absolute, for numbers. Unproven is False."""
        question = (gold, pred, tolerance)
        with self._lock:
            if question in self._answers:
                return self._answers[question]
        worker = self._idle.get() or _Worker(self.cpu_seconds)
        answer = None
        try:
            answer = worker.ask({"gold": gold, "pred": pred, "tolerance": tolerance})
        finally:
            if answer is None:
                worker.close()
            self._idle.put(worker if answer is not None else None)
        with self._lock:
            self.timeouts += answer is None
            self._answers[question] = bool(answer)
        return bool(answer)

    def close(self) -> None:
        """Ends the idle workers."""
        while True:
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                return
            if worker is not None:
                worker.close()


@cache
def shared() -> Algebra:
    """The process's own pool, closed at its end."""
    pool = Algebra()
    atexit.register(pool.close)
    return pool
