"""What the engines of a job do: tokens, as progress that moves while answers are long and as metrics of Ray.

The engines live in many processes. Each tells a board, a small Ray actor of the job, and the job looks at the board.
Each also tells Ray's metrics, which the nodes export to Prometheus.
"""

from __future__ import annotations

import threading
import time
import uuid
import weakref
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from s2t_models.engines.contract import Counted, CountsTokens

_EVERY_S = 2.0
#: Names of the metrics, which Ray exports with ray_ before them, and kinds of tokens, as `Counted` has them.
TOKENS, RUNNING = "s2t_engine_tokens", "s2t_engine_running"
KINDS = ("written", "read", "cached")


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


def keep_posted(engine: object, name: str, board: Any = None) -> None:
    """Tell Ray's metrics what the engine called `name` does, and the `board` what it has written, every two seconds
    from a thread, for as long as the engine is there. Does nothing where there is no Ray, or for an engine that does
    not count."""
    if not (ray.is_initialized() and isinstance(engine, CountsTokens)):
        return
    still = weakref.ref(engine)
    tokens = Counter(TOKENS, "Tokens that engines wrote, read, or had in their cache.", ("engine", "kind"))
    running = Gauge(RUNNING, "Calls under way in an engine: how wide its batches are.", ("engine",))

    def post() -> None:
        key, known = uuid.uuid4().hex, Counted()
        while ray.is_initialized() and (counting := still()) is not None:
            counted = counting.counted
            del counting
            for kind in KINDS:
                if (more := getattr(counted, kind) - getattr(known, kind)) > 0:
                    tokens.inc(more, {"engine": name, "kind": kind})
            running.set(counted.running, {"engine": name})
            if board is not None and counted.written != known.written:
                board.note.remote(key, counted.written)
            known = counted
            time.sleep(_EVERY_S)

    threading.Thread(target=post, name="written", daemon=True).start()
