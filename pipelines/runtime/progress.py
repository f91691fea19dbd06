"""Progress as one calm line: rewritten in place on a terminal, a new line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from s2t_models.errors import UserError

_EVERY_S = 1.0
_LOG_EVERY_S = 30.0


class Progress:
    """Shows `count()` of `total` while the `with` block runs. The count is polled in a thread, so that any
    blocking call can be watched from outside. With `tokens`, also how many have been written, and how fast since the
    last look: a count that moves while rows are long. A count that fails, because a store is away for a while, is the
    last one again: what is only shown stops no job.

        with Progress("collect", "rows", total=2400, count=rows_written):
            dataset.write_datasink(sink)
    """

    def __init__(
        self,
        name: str,
        unit: str,
        total: int,
        count: Callable[[], int],
        tokens: Callable[[], int] | None = None,
    ) -> None:
        self.name, self.unit, self.total, self.count, self.tokens = name, unit, total, count, tokens
        self._known = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._begin, self._first = time.monotonic(), self._counted()
        self._shown, self._written = self._begin, 0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._show(last=True)

    def _counted(self) -> int:
        with suppress(OSError, UserError):
            self._known = self.count()
        return self._known

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self._show()

    def _show(self, last: bool = False) -> None:
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not (terminal or last or now - self._shown >= _LOG_EVERY_S):
            return
        since, self._shown = now - self._shown, now
        done, seconds = self._counted(), now - self._begin
        self._first = min(self._first, done)  # resumed from a checkpoint, the count goes back to it
        rate = (done - self._first) / seconds if seconds else 0.0
        per, period = (rate, "s") if rate >= 1 or not rate else (60 * rate, "min")
        text = f"{self.name}: {done}/{self.total} {self.unit}, {seconds:.0f} s, {per:.1f} {self.unit}/{period}"
        if self.tokens is not None and (written := self.tokens()):
            speed, self._written = max(written - self._written, 0) / max(since, 0.1), written
            text += f"; {written:,} tokens" + ("" if last else f", {speed:.0f} tokens/s")
        print(
            f"\r{text:<78}" if terminal else text,
            end="" if terminal and not last else "\n",
            file=sys.stderr,
            flush=True,
        )
