"""How many tokens the engines of a job have written so far: progress that moves while answers are long.

The engines live in many processes. Each tells a board, a small Ray actor of the job, and the job looks at the board.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import ray

from s2t_models.engines.contract import CountsTokens

_EVERY_S = 2.0


class TokenBoard:
    """Keeps the latest count of each engine."""

    def __init__(self) -> None:
        self._written: dict[str, int] = {}

    def note(self, engine: str, written: int) -> None:
        self._written[engine] = written

    def total(self) -> int:
        return sum(self._written.values())


def new_board() -> Any:
    """A board on the running cluster, as a handle that actors can be given. It ends with its last handle."""
    return ray.remote(num_cpus=0)(TokenBoard).remote()


def total(board: Any) -> int:
    """What all engines have written, 0 where the board does not answer soon."""
    try:
        return int(ray.get(board.total.remote(), timeout=_EVERY_S))
    except ray.exceptions.RayError:
        return 0


def keep_posted(board: Any, engine: object) -> None:
    """Tell the board what the engine has written, every two seconds from a thread, for as long as the process lives.
    Does nothing without a board, or for an engine that does not count."""
    if board is None or not isinstance(engine, CountsTokens):
        return
    name, counting = uuid.uuid4().hex, engine

    def post() -> None:
        known = 0
        while True:
            time.sleep(_EVERY_S)
            if counting.written != known:
                known = counting.written
                board.note.remote(name, known)

    threading.Thread(target=post, name="written", daemon=True).start()
