"""An MLflow server on this machine that can be killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from .raylets import free_port


class TrackingServer:
    """What it keeps is in `folder`; its runs in the database `store`, by default a file there."""

    def __init__(self, folder: Path, store: str | None = None) -> None:
        self.port, self.folder = free_port(), folder
        self.store = store or f"sqlite:///{folder}/mlflow.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Left as it is where it runs."""
        if self.process is not None and self.process.poll() is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        store = ["--backend-store-uri", self.store]
        store += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1", *store],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes that nothing here asks
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.3)
        self.kill()
        raise RuntimeError("MLflow does not start")

    def kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def finished_runs(self) -> int:
        """How many runs it holds that have ended well."""
        import mlflow

        client = mlflow.MlflowClient(self.store)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return len(client.search_runs(experiments, "attributes.status = 'FINISHED'"))

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"
