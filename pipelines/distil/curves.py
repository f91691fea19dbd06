"""A training's figures as it runs: rank 0 appends them to a log, the driver reads them into MLflow."""

from __future__ import annotations

import json

import mlflow

from pipelines.runtime.records import NewLines, RecordLog
from s2t_models.storage import Location


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


class Follower:
    """Reads the log as it grows, into an MLflow run. A job that goes on reads the earlier part too, so that its curves
    are whole."""

    def __init__(self, folder: Location, run: str) -> None:
        self.run = run
        self.begun: list[int] = []
        self._lines, self._step = NewLines(folder), 0

    def step(self) -> int:
        """Log what is new; the last step known."""
        for line in self._lines():
            record = json.loads(line)
            if "begun" in record:
                self.begun.append(record["begun"])
            else:
                self._step = record["step"]
                mlflow.log_metrics(record["metrics"], step=record["step"], run_id=self.run)
        return self._step
