"""MLflow that is away when a stage ends: the results are kept, and the same command logs them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from recorded import recorded_results, recorded_shards

from pipelines.analyse.__main__ import main as analyse
from pipelines.data.shards import shards_digest
from pipelines.distil.curves import CURVES, Curves
from pipelines.distil.follower import Follower
from pipelines.distil.runs import log_trained, open_run
from pipelines.results.report import report
from s2t_models.artifact import Artifact
from s2t_models.recipe import load_recipe
from serving.store import StoreError

AWAY = "http://127.0.0.1:9"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    before = mlflow.get_tracking_uri()
    yield f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(before)


def finished(store: str, stage: str) -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"attributes.status = 'FINISHED' AND tags.`s2t.stage` = '{stage}'")


def test_a_training_is_logged_and_registered_later_with_its_curves(
    store: str,
    recipe_path: Path,
    untrained_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe(recipe_path)
    train, training = tmp_path / "train", tmp_path / "artifact.training"
    recorded_shards(train)
    done = Artifact.load(untrained_artifact).card.provenance
    done = done.model_copy(update={"shards": {"training": shards_digest(train)}, "validation": {"agree_at_1": 0.75}})
    curves = Curves(training / CURVES)
    curves.begin(0)
    curves.add(4, {"train/loss": 3.0})

    def log(run: str | None = None) -> None:
        log_trained(
            recipe, done, untrained_artifact, {"training": train}, training, Follower(training / CURVES), run
        )  # as another process does

    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    with pytest.raises(StoreError), open_run(recipe, done, {"training": train}, has_begun=False):
        pass
    with open_run(recipe, done, {"training": train}, has_begun=True) as run:
        assert run is None
    log()
    said = capsys.readouterr().err
    assert "the training goes on, and is logged at its end" in said
    assert "is whole, and the same command logs and registers it" in said
    assert training.is_dir()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    log()
    assert not training.exists()
    (logged,) = finished(store, "distil")
    assert logged.data.metrics["train/loss"] == 3.0
    assert logged.data.metrics["best/agree_at_1"] == 0.75
    assert mlflow.MlflowClient(store).search_model_versions("name = 'embedded-selector'")
    log()
    assert len(finished(store, "distil")) == 1, "what is registered is not logged again"


def test_a_run_is_open_while_a_training_runs_and_failed_where_it_fails(
    store: str, recipe_path: Path, tmp_path: Path, untrained_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    recorded_shards(tmp_path / "train")
    done = Artifact.load(untrained_artifact).card.provenance
    done = done.model_copy(update={"shards": {"training": shards_digest(tmp_path / "train")}})
    runs = []

    def fail() -> None:
        with open_run(load_recipe(recipe_path), done, {}, has_begun=False) as run:
            assert run
            assert mlflow.get_run(run).info.status == "RUNNING"
            runs.append(run)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert mlflow.get_run(runs[0]).info.status == "FAILED"


def test_results_are_reported_and_logged_later(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = recorded_results(tmp_path / "results.parquet")
    tables, seen = report(results, tmp_path, AWAY)
    assert seen == "not logged"
    assert (tmp_path / "tables.md").read_text() == tables
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not logged to MLflow: ")
    assert line.endswith(f"; {results} is whole, and the same command logs it")
    assert report(results, tmp_path, store)[0] == tables
    assert len(finished(store, "benchmark")) == 1


def test_an_analysis_that_ends_without_its_store_is_kept(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded_shards(tmp_path / "train")
    command = [str(tmp_path / "train"), "--output", str(tmp_path / "out"), "--tracking"]

    def away(*arguments: object, **named: object) -> None:
        raise mlflow.exceptions.MlflowException("gone")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "start_run", away)
        assert analyse([*command, store]) == 0
    assert capsys.readouterr().err.startswith("not logged to MLflow: gone; ")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")}
    assert kept
    assert analyse([*command, store]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")} == kept
    assert len(finished(store, "analyse")) == 1
    assert analyse([*command, AWAY]) == 2, "before anything is computed"
