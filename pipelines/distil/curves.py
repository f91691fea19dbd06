"""A training's figures as it runs: rank 0 appends them to a file of JSON lines, the driver reads them into MLflow."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow


def append_begin(path: Path, step: int) -> None:
    """Record that a worker group begins at this optimiser step."""
    _append(path, {"begun": step})


def append_metrics(path: Path, step: int, metrics: dict[str, float]) -> None:
    """Record figures at an optimiser step."""
    _append(path, {"step": step, "metrics": metrics})


class Follower:
    """Reads the file as it grows, into an MLflow run. A job that goes on reads the earlier part too, so that its
    curves are whole."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.begun: list[int] = []
        self._offset = self._step = 0

    def step(self) -> int:
        """Log what is new; the last step known."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = json.loads(line)
                if "begun" in record:
                    self.begun.append(record["begun"])
                else:
                    self._step = record["step"]
                    mlflow.log_metrics(record["metrics"], step=record["step"], run_id=self.run)
        return self._step


def _append(path: Path, record: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
