"""An MLflow server with its runs in PostgreSQL, as several people's jobs share one: many jobs log to it at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from faults.tracking_server import TrackingServer
from processes import REPOSITORY, free_port
from recorded import recorded_results

JOBS = 4
JOB = """
import sys
from pathlib import Path
from pipelines.results.report import report
results, output, store = sys.argv[1:]
report(Path(results), Path(output), store)
"""


@pytest.fixture
def database() -> Iterator[str]:
    """A server of its own, as its URI. PostgreSQL does not run as root."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("PostgreSQL's initdb and pg_ctl are not on the path")
    if not find_spec("psycopg"):
        pytest.skip("PostgreSQL's driver is not installed (pip install psycopg[binary])")
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        data, port = f"{folder}/data", free_port()

        def run(*command: str) -> None:
            subprocess.run(command, user=user, cwd=folder, stdout=subprocess.DEVNULL, check=True)

        run("initdb", "-D", data, "-U", "s2t", "-A", "trust")
        run("pg_ctl", "-D", data, "-l", f"{folder}/log", "-o", f"-p {port} -k {folder}", "-w", "start")
        try:
            yield f"postgresql://s2t@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")


@pytest.mark.slow
def test_jobs_that_end_at_once_are_all_logged(database: str, tmp_path: Path) -> None:
    results = recorded_results(tmp_path / "results.parquet")
    server = TrackingServer(tmp_path / "mlflow", database)
    server.start()
    try:
        command = [sys.executable, "-c", JOB, str(results)]
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        jobs = [
            subprocess.Popen(
                [*command, str(tmp_path / f"report {number}"), server.uri],
                env=os.environ | {"PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(JOBS)
        ]
        said = [job.communicate(timeout=300)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0] * JOBS, said
        assert not any("not logged" in text for text in said)
        logged = server.finished_runs()
    finally:
        server.kill()
    assert logged % JOBS == 0
    assert logged > JOBS, "each has a run, and one below it for each policy"
