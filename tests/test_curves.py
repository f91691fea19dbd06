"""A training's curves on their way to MLflow, whose store may be away for a while."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from pipelines.distil.curves import Curves
from pipelines.distil.follower import Follower
from pipelines.distil.job import _noting
from pipelines.runtime import tracking
from serving.store import use_store


def test_what_the_store_did_not_take_is_logged_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_store(f"sqlite:///{tmp_path}/mlflow.db")
    with tracking.start_run("training") as run:
        pass
    follower = Follower(tmp_path / "curves")
    assert follower.step(run) == 0, "there is no log yet"
    curves = Curves(tmp_path / "curves")
    curves.begin(0)
    curves.add(4, {"train/loss": 3.0})
    assert follower.step(run) == 4
    curves.add(8, {"train/loss": 2.0})

    def away(*arguments: object, **named: object) -> None:
        raise mlflow.exceptions.MlflowException("the store is away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "log_metrics", away)
        assert follower.step(run) == 8, "progress goes on"
        curves.begin(8)
        curves.add(12, {"train/loss": 1.0})
        assert follower.step(run) == 12
        with pytest.raises(mlflow.exceptions.MlflowException):
            follower.log(run)
    follower.log(run)
    history = mlflow.MlflowClient().get_metric_history(run, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(4, 3.0), (8, 2.0), (12, 1.0)]
    assert follower.begun == [0, 8]


def test_how_far_the_making_of_a_product_is_shows_beside_the_training(tmp_path: Path) -> None:
    use_store(f"sqlite:///{tmp_path}/mlflow.db")
    with tracking.start_run("training") as run:
        pass
    Curves(tmp_path / "curves").add(4, {"train/loss": 3.0})
    note, follower = _noting(tmp_path / "curves"), Follower(tmp_path / "curves")
    assert follower.percent(run) == 0
    note(0.25, {})
    note(0.5, {"decider/loss": 2.0})
    assert follower.percent(run) == 25, "at most now and then"
    note(1.0, {"decider/loss": 1.0})
    assert follower.percent(run) == 100
    assert follower.step(run) == 4
    (metric,) = mlflow.MlflowClient().get_metric_history(run, "decider/loss")
    assert (metric.step, metric.value) == (100, 1.0)
