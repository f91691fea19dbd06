"""Thresholds by budget: how they are set, and the file in which a collection keeps them.

Axes: _M step of any trajectory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from s2t_models.errors import UserError, first_problem
from s2t_models.storage import Location

#: The budgets tau that thresholds are set for.
BUDGETS = (0.01, 0.02, 0.05, 0.10, 0.20)
#: The file in a collection's folder.
THRESHOLDS = "thresholds.json"


class CalibrationError(UserError):
    """A file that holds no calibration; the message is one line."""


class Calibration(BaseModel):
    """What `s2t collect` writes as thresholds.json: for KL and entropy, in nats, the threshold of each budget over all
    `steps` of a collection, and what that collection is of.

    `rows` are the hashes of its prompts (`splits.question_hashes`); `slm`, `teacher` and `tokenizer` sha256 of files;
    `divergence` names how KL was computed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl: dict[float, float]
    entropy: dict[float, float]
    steps: int
    rows: tuple[str, ...]
    task: str
    slm: str
    teacher: str
    tokenizer: str
    divergence: str

    @property
    def thresholds(self) -> dict[str, dict[float, float]]:
        """metric -> budget -> threshold."""
        return {"kl": self.kl, "entropy": self.entropy}

    def threshold(self, metric: Literal["kl", "entropy"], budget: float) -> float:
        """Raises CalibrationError where the budget was not calibrated."""
        known = self.thresholds[metric]
        if budget not in known:
            budgets = ", ".join(f"{tau:g}" for tau in known)
            raise CalibrationError(f"no {metric} threshold for budget {budget:g}; calibrated budgets: {budgets}")
        return known[budget]

    @classmethod
    def read(cls, path: Location) -> Calibration:
        """Read the file `path`, or the one in the folder `path`. Raises CalibrationError."""
        path = calibration_file(path)
        if not path.is_file():
            raise CalibrationError(f"{path}: no such file; `s2t collect` writes one")
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            missing = [str(problem["loc"][0]) for problem in error.errors() if problem["type"] == "missing"]
            problem = f"lacks {', '.join(missing)}" if missing else first_problem(error)
            raise CalibrationError(f"{path}: {problem}; `s2t collect` writes such a file") from None


def calibration_file(path: Location) -> Location:
    """The file that `trigger.calibration` names: `path` itself, or a collection's thresholds.json."""
    return path / THRESHOLDS if path.is_dir() else path


def calibrate(values_M: Iterable[float] | np.ndarray, budgets: Iterable[float]) -> dict[float, float]:
    """The threshold of each budget tau: a step triggers when its value >= threshold (E.2, dynamic thresholding).

    The threshold is the value of rank round(tau * M), at least 1, from the top. Steps that tie with it all trigger, so
    the share that does is never below tau (but for the rounding) and above it only by ties. Raises ValueError for no
    values.
    """
    descending_M = np.sort(np.asarray(values_M, dtype=np.float64))[::-1]
    if not len(descending_M):
        raise ValueError("calibration needs at least one step")
    return {tau: float(descending_M[max(round(tau * len(descending_M)), 1) - 1]) for tau in budgets}
