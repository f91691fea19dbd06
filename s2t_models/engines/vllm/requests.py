"""What a call tells the sampler in the worker, and how the answer is laid out.

vLLM carries `SamplingParams.extra_args` to the worker untouched, and a request's log-probabilities back: a table of ids
and floats, a row a step. Both ends of that road are here. Axes: _T step, _N support, _W column.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: The key of `extra_args`.
KEY = "s2t"
#: Columns of a decode step before its support: the token with the trigger head's logit, and whether the head fired with
#: the entropy.
LEADING = 2


def told_apart(ids_BW: np.ndarray, vocabulary: int) -> np.ndarray:
    """The ids of a table, in which none comes twice in a row: where vLLM joins two outputs of a request that its caller
    was slow to take, it goes by way of a dictionary of each step, and columns of the same id would become one."""
    return ids_BW + vocabulary * np.arange(ids_BW.shape[1])


def as_they_were(ids_BW: np.ndarray, vocabulary: int) -> np.ndarray:
    """What `told_apart` was given."""
    return ids_BW % vocabulary


@dataclass(frozen=True)
class Decoding:
    """Decode as `contract.Sampling` says. The step is counted by the worker from `first_step`. `penalties` are the
    presence, frequency and repetition penalty; empty where they change nothing."""

    seed: int
    first_step: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    penalties: tuple[float, ...]
    support: int
    threshold: float | None
    warmup: int
    trigger_support: int

    @property
    def columns(self) -> int:
        """How many columns a step's answer has; 0 where nothing but the token is asked for."""
        if not self.support and self.threshold is None:
            return 0
        return LEADING + max(self.support, self.trigger_support if self.threshold is not None else 0)


@dataclass(frozen=True)
class Leaf:
    """Score the last token of the prompt as a candidate: the answer's first column holds its score (Eq. 5)."""

    columns = 1


@dataclass(frozen=True)
class Labelling:
    """Log-probabilities of `ids` [T, N] (int32, row by row) along the prompt, from the one that predicts position
    `start` on, and the `support` most probable ids there. The answer has a row for each: in the first column the
    argmax, then the ids, then the support."""

    start: int
    rows: int
    ids: bytes
    support: int = 0
    columns = 0

    @staticmethod
    def of(start: int, ids_TN: np.ndarray, support: int = 0) -> Labelling:
        return Labelling(start, len(ids_TN), np.ascontiguousarray(ids_TN, dtype=np.int32).tobytes(), support)

    @property
    def width(self) -> int:
        """Columns behind the first."""
        return len(self.ids) // (4 * self.rows) + self.support

    @property
    def ids_TN(self) -> np.ndarray:
        return np.frombuffer(self.ids, dtype=np.int32).reshape(self.rows, -1)


Asked = Decoding | Leaf | Labelling
_KINDS: dict[str, type[Asked]] = {"decoding": Decoding, "leaf": Leaf, "labelling": Labelling}


def pack(asked: Asked) -> dict[str, Any]:
    """`extra_args` of a request."""
    kind = next(name for name, kind in _KINDS.items() if isinstance(asked, kind))
    return {KEY: {"kind": kind, **asdict(asked)}}


def unpack(extra_args: dict[str, Any] | None) -> Asked | None:
    """What `pack` packed; None for a request of vLLM's own, such as those of its warm-up."""
    if not extra_args or KEY not in extra_args:
        return None
    fields = dict(extra_args[KEY])
    return _KINDS[fields.pop("kind")](**fields)
