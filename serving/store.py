"""The MLflow store: which one it is, and that it is there before anything depends on it.

A database file by default, with what is kept in a folder beside it; any MLflow URI works instead. Stages write their
runs and models to it, serving reads models from it. MLflow is imported where it is used: commands that only show their
options do without.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from s2t_models.errors import UserError, one_line
from serving import http

STORE = "sqlite:///runs/mlflow.db"
EXPERIMENT = "s2t"
#: The experiment's kind: runs and models, not traces. MLflow 3.17's own page goes by a switch of the browser first,
#: which links set (`pipelines.runtime.tracking.link`).
KIND = ("mlflow.experimentKind", "custom_model_development")
_PROBE_S = 10
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}


class StoreError(UserError):
    """An MLflow store that cannot be used; the message is one line."""


def use_store(uri: str | None = None) -> str:
    """Point MLflow at `uri` (default: $MLFLOW_TRACKING_URI, then STORE), make the store's file and the experiment where
    they are missing, and return the URI. Raises StoreError where there is no such store."""
    uri = _chosen(uri)
    location = None
    if file := _file(uri):
        file.parent.mkdir(parents=True, exist_ok=True)
        location = (file.parent / "mlartifacts").as_uri()
    with _reached(uri):
        import mlflow

        with impatient():
            experiment = mlflow.get_experiment_by_name(EXPERIMENT)
            if experiment is None:
                mlflow.create_experiment(EXPERIMENT, artifact_location=location, tags=dict([KIND]))
            elif KIND[0] not in experiment.tags:  # which its readers may have set otherwise
                mlflow.MlflowClient().set_experiment_tag(experiment.experiment_id, *KIND)
        mlflow.set_experiment(EXPERIMENT)
    return uri


def experiment_id() -> str:
    """The id of the experiment of the last `use_store`."""
    import mlflow

    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return str(experiment.experiment_id)


def open_store() -> str:
    """Point MLflow at the store that is there, as `use_store` without an argument would, and return its URI. Raises
    StoreError where there is none: reading makes no store."""
    uri = _chosen(None)
    if (file := _file(uri)) and not file.is_file():
        raise StoreError(f"MLflow store {uri}: there is no such file; name the store in MLFLOW_TRACKING_URI")
    with _reached(uri), impatient():
        import mlflow

        mlflow.search_experiments(max_results=1)
    return uri


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}{at}{host}")) if at else uri


def _chosen(uri: str | None) -> str:
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or STORE


def _file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextmanager
def _reached(uri: str) -> Iterator[None]:
    """MLflow at `uri` and quiet; what it cannot do there is a StoreError."""
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _probe(uri)
        mlflow.set_tracking_uri(uri)
        yield
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        reason = one_line(error)
        if "Max retries exceeded" in reason:  # after which urllib3 says at length where
            reason = "no server answers there; start it, or name another in MLFLOW_TRACKING_URI"
        raise StoreError(f"MLflow store {without_password(uri)}: cannot be used: {reason}") from None


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
def impatient() -> Iterator[None]:
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
