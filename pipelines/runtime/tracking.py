"""What jobs write to the MLflow store: a parent run a job, and under it a child run a (policy, task); the data and
models that a run began with; and where to see it.

Nothing here knows what is tracked. The store itself is `serving.store`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit, urlunsplit

from s2t_models.errors import UserError, one_line
from s2t_models.storage import Location, ObjectPath, copied
from serving.store import experiment_id, impatient, use_store, without_password

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.data.dataset import Dataset
    from mlflow.data.dataset_source import DatasetSource

#: Where `mlflow ui` shows a store that no server does.
_LOCAL_UI = "http://127.0.0.1:5000"
#: What makes MLflow's pages those of runs and models; a browser that has not chosen yet gets those of traces.
_VIEW = "workflowType=machine_learning"
#: The longest digest that MLflow keeps of a data set.
_DIGEST = 36


def use_store_for(has_begun: bool, kept: str, uri: str | None = None) -> bool:
    """`use_store`, before any work: a job that has not begun is refused where the store is not there (StoreError). One
    that goes on is not: it may lose more than its record. Returns whether the store is there; `kept` says what is safe,
    as for `costs_nothing`."""
    if not has_begun:
        use_store(uri)
        return True
    with costs_nothing(kept):
        use_store(uri)
        return True
    return False


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


def leave_open(run: str) -> None:
    """Take a run that was ended for one that is under way: a job that takes hours holds none active meanwhile."""
    import mlflow

    mlflow.MlflowClient().update_run(run, status="RUNNING")


@contextmanager
def go_on_with(run: str) -> Iterator[None]:
    """The run that was left open, which ends with the block."""
    import mlflow

    with mlflow.start_run(run_id=run):
        yield


def give_up(run: str) -> None:
    """The run that was left open has failed; if the store is not there, it stays open."""
    import mlflow

    with suppress(mlflow.exceptions.MlflowException, OSError), impatient():
        mlflow.MlflowClient().set_terminated(run, "FAILED")


@contextmanager
def costs_nothing(kept: str) -> Iterator[None]:
    """Where the store fails in the block, say so in one line on stderr and go on: `kept` says what is safe all the
    same, and how to log it after all."""
    import mlflow

    try:
        yield
    except (mlflow.exceptions.MlflowException, OSError, UserError) as error:
        print(f"not logged to MLflow: {one_line(error)}; {kept}", file=sys.stderr)


def find_runs(tag: str, value: str, most: int = 8) -> list[str]:
    """The ids of finished runs of the experiment in use whose tag has this value, the latest first."""
    import mlflow

    runs = mlflow.search_runs(
        filter_string=f"tags.`{tag}` = '{value}' AND attributes.status = 'FINISHED'",
        max_results=most,
        output_format="list",
    )
    return [run.info.run_id for run in runs]


def dataset(name: str, digest: str, source: Location | None = None) -> Dataset:
    """Rows that a run reads or writes, known by name and digest (a sha256, cut to what MLflow keeps); `source` is their
    folder, where they have one."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.data.meta_dataset import MetaDataset

    place: DatasetSource = CodeDatasetSource({"s2t.task": name})
    if source is not None:
        kind = source.uri.partition("://")[0] if isinstance(source, ObjectPath) else "local"
        place = get_dataset_source_from_json(json.dumps({"uri": str(source.resolve())}), source_type=kind)
    return MetaDataset(place, name, digest[:_DIGEST])  # type: ignore[abstract]  # `profile` it does without


def log_dataset(rows: Dataset, context: str) -> None:
    """Rows that the active run has to do with; `context` says how: collected, training, calibration, test."""
    import mlflow

    mlflow.log_input(rows, context=context)


def log_model_input(model_id: str) -> None:
    """A logged model that the active run uses."""
    import mlflow
    from mlflow.entities import LoggedModelInput

    mlflow.log_input(model=LoggedModelInput(model_id))


def log_params(params: Mapping[str, Any]) -> None:
    """Parameters, nested mappings as dotted names, values cut to what MLflow keeps."""
    import mlflow

    flat = {key: str(value)[:6000] for key, value in _flatten(params)}
    keys = list(flat)
    for start in range(0, len(keys), 100):
        mlflow.log_params({key: flat[key] for key in keys[start : start + 100]})


def log_metrics(
    metrics: Mapping[str, float | None],
    step: int | None = None,
    model_id: str | None = None,
    rows: Dataset | None = None,
) -> None:
    """Metrics; those that are None are left out. They are those of the logged model `model_id` too, measured on
    `rows`, where these are given."""
    import mlflow

    known = {key: float(value) for key, value in metrics.items() if value is not None}
    mlflow.log_metrics(known, step=step, model_id=model_id, dataset=rows)


def log_table(rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Rows as a table that the MLflow UI shows and `mlflow.load_table` reads; `name` ends in .json."""
    import mlflow

    if rows:
        mlflow.log_table({key: [row[key] for row in rows] for key in rows[0]}, name)


def log_text(text: str, name: str) -> None:
    import mlflow

    mlflow.log_text(text, name)


def log_file(path: Location) -> None:
    import mlflow

    with copied(path) as here:
        mlflow.log_artifact(str(here))


def log_folder(folder: Location, name: str) -> None:
    """The files of a folder, below `name`."""
    import mlflow

    with copied(folder) as here:
        mlflow.log_artifacts(str(here), name)


def log_figure(figure: Figure, name: str) -> None:
    import mlflow

    mlflow.log_figure(figure, name)


def link(runs: Sequence[str]) -> str:
    """Where the runs are seen: one run's page, or several side by side; and for a store that no server shows, the
    command that does."""
    import mlflow

    store = mlflow.get_tracking_uri()
    served = urlsplit(store).scheme in ("http", "https")
    experiment = experiment_id()
    if len(runs) == 1:
        page = f"/experiments/{experiment}/runs/{runs[0]}"
    else:
        page = f"/compare-runs?runs={_quoted(runs)}&experiments={_quoted([experiment])}"
    url = f"{_address(store) if served else _LOCAL_UI}/#{page}{'&' if '?' in page else '?'}{_VIEW}"
    if served:
        return url
    tool = os.path.join(os.path.relpath(Path(sys.executable).parent), "mlflow")
    return f"{url}\nonce this runs: {tool} ui --backend-store-uri {without_password(store)} --port 5000"


def _address(uri: str) -> str:
    """The server's address without user and password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")


def _quoted(values: Sequence[str]) -> str:
    return quote(json.dumps(list(values), separators=(",", ":")), safe="")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
