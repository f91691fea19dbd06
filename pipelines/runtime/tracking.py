"""MLflow, quietly: a parent run a job, and under it a child run a (policy, task).

The store is a database file by default, with artifacts in a folder beside it; any MLflow URI works instead.
Nothing here knows what is tracked.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.runtime import http
from s2t_models.errors import UserError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STORE = "sqlite:///runs/mlflow.db"
EXPERIMENT = "s2t"
_PROBE_S = 10
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}


class TrackingError(UserError):
    """An MLflow store that cannot be used."""


def use_store(uri: str | None = None) -> str:
    """Point MLflow at `uri` (default: $MLFLOW_TRACKING_URI, then STORE), make the experiment where it is
    missing, and return the URI. Raises TrackingError where there is no such store."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    location = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).resolve().parent
        folder.mkdir(parents=True, exist_ok=True)
        location = (folder / "mlartifacts").as_uri()
    try:
        _probe(uri)
        mlflow.set_tracking_uri(uri)
        with _impatient():
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=location)
        mlflow.set_experiment(EXPERIMENT)
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        raise TrackingError(f"MLflow store {uri}: cannot be used: {one_line(error)}") from None
    return uri


def _probe(uri: str) -> None:
    """Reach a near server directly, and see that a database answers. Raises OSError where it does not."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if http.is_near(uri):
            known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
            os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, [known, parts.hostname]))
    elif parts.hostname and (port := parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])):
        socket.create_connection((parts.hostname, port), timeout=_PROBE_S).close()


@contextmanager
def _impatient() -> Iterator[None]:
    """One attempt of a few seconds: MLflow's own patience, minutes of it without a word, is for a store that has
    answered before."""
    few = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_PROBE_S)}
    before = {name: os.environ.get(name) for name in few}
    os.environ.update(few)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def start_run(
    name: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[str]:
    """A run in the store of the last `use_store`; inside another one it is its child. Yields the run's id."""
    import mlflow

    with mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None, tags=dict(tags or {})) as run:
        if params:
            log_params(params)
        yield run.info.run_id


def log_params(params: Mapping[str, Any]) -> None:
    """Parameters, nested mappings as dotted names, values cut to what MLflow keeps."""
    import mlflow

    flat = {key: str(value)[:6000] for key, value in _flatten(params)}
    keys = list(flat)
    for start in range(0, len(keys), 100):
        mlflow.log_params({key: flat[key] for key in keys[start : start + 100]})


def log_metrics(metrics: Mapping[str, float | None], step: int | None = None) -> None:
    """Metrics; those that are None are left out."""
    import mlflow

    mlflow.log_metrics({key: float(value) for key, value in metrics.items() if value is not None}, step=step)


def log_table(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Rows as a table that the MLflow UI shows and `mlflow.load_table` reads; `name` ends in .json."""
    import mlflow

    if rows:
        mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, name)


def log_text(text: str, name: str) -> None:
    import mlflow

    mlflow.log_text(text, name)


def log_file(path: Path) -> None:
    import mlflow

    mlflow.log_artifact(str(path))


def log_figure(figure: Figure, name: str) -> None:
    import mlflow

    mlflow.log_figure(figure, name)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
