"""A training's figures as it runs: rank 0 appends them to a log, which the driver follows."""

from __future__ import annotations

from pipelines.runtime.records import RecordLog
from s2t_models.storage import Location

#: The folder of the log, in that of a training.
CURVES = "curves"


class Curves:
    """The log of rank 0."""

    def __init__(self, folder: Location) -> None:
        self._log = RecordLog(folder)

    def begin(self, step: int) -> None:
        """Record that a worker group begins at this optimiser step."""
        self._log.append({"begun": step})

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Record figures at an optimiser step."""
        self._log.append({"step": step, "metrics": metrics})

    def build(self, share: float, metrics: dict[str, float]) -> None:
        """Record which share of making the product is done, once the training is, and figures of what is trained for
        it."""
        self._log.append({"built": share, "metrics": metrics})
