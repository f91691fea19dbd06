"""Follows the log of a training's figures (see `curves`), and logs them to MLflow."""

from __future__ import annotations

import json
from contextlib import suppress

import mlflow

from pipelines.runtime.records import NewLines
from s2t_models.storage import Location
from serving.store import impatient


class Follower:
    """Reads the log as it grows. A job that goes on reads the earlier part too, so that its curves are whole."""

    def __init__(self, folder: Location) -> None:
        self.begun: list[int] = []
        self._lines = NewLines(folder)
        self._logged = self._step = self._percent = 0
        self._records: list[tuple[int, dict[str, float]]] = []

    def step(self, run: str | None = None) -> int:
        """Read what is new; the last step known. What the MLflow run has not got is logged to it; where the store
        fails, that is left for the next time: it costs the training nothing."""
        for line in self._lines():
            record = json.loads(line)
            if "begun" in record:
                self.begun.append(record["begun"])
            elif "built" in record:
                self._percent = round(100 * record["built"])
                if record["metrics"]:
                    self._records.append((self._percent, record["metrics"]))
            else:
                self._step = record["step"]
                self._records.append((record["step"], record["metrics"]))
        if run is not None:
            with suppress(mlflow.exceptions.MlflowException, OSError), impatient():
                self._log(run)
        return self._step

    def percent(self, run: str | None = None) -> int:
        """As `step`; how much of making the product is done."""
        self.step(run)
        return self._percent

    def log(self, run: str) -> None:
        """Read and log all that the run has not got yet. Raises what MLflow raises."""
        self.step()
        self._log(run)

    def _log(self, run: str) -> None:
        for step, metrics in self._records[self._logged :]:
            mlflow.log_metrics(metrics, step=step, run_id=run)
            self._logged += 1
