"""MLflow runs of a job in a real store: a parent with tables and figures, children with metrics."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from recorded import recorded_results

from pipelines.results.report import report
from pipelines.results.summary import TRAINING
from pipelines.runtime import tracking
from serving.store import EXPERIMENT, StoreError, use_store


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"


def test_nested_runs_parameters_and_tables(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    use_store(store)
    with tracking.start_run("job", {"recipe": {"name": "pair", "seeds": [0, 1]}}) as parent:
        with tracking.start_run("child", {"policy": "greedy"}, {"kind": "policy"}) as child:
            tracking.log_metrics({"accuracy": 0.5, "deviation": None})
            tracking.log_table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], "tables/t.json")
        tracking.log_text("text", "note.md")
    runs = {run: mlflow.get_run(run) for run in (parent, child)}
    assert runs[child].data.tags["mlflow.parentRunId"] == parent
    assert runs[parent].data.params == {"recipe.name": "pair", "recipe.seeds": "[0, 1]"}
    assert runs[child].data.metrics == {"accuracy": 0.5}
    assert runs[child].info.artifact_uri.startswith((tmp_path / "runs" / "mlartifacts").as_uri())
    table = mlflow.artifacts.load_dict(f"{runs[child].info.artifact_uri}/tables/t.json")
    assert table == {"columns": ["a", "b"], "data": [[1, "x"], [2, "y"]]}
    assert mlflow.active_run() is None
    assert capsys.readouterr().err == ""


def test_a_store_that_fails_at_the_end_costs_one_line(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_store(store)
    (tmp_path / "runs" / "mlflow.db").write_text("no longer a database\n")
    with tracking.costs_nothing("runs/train is whole, and the same command logs it"):
        use_store(store)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("not logged to MLflow: MLflow store sqlite:")
    assert line.endswith("; runs/train is whole, and the same command logs it")


def test_a_store_that_is_away_stops_what_begins_and_not_what_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    away = "http://127.0.0.1:9"
    with pytest.raises(StoreError, match="cannot be used"):
        tracking.use_store_for(False, "work is kept", away)
    tracking.use_store_for(True, "work is kept", away)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"not logged to MLflow: MLflow store {away}: cannot be used: no server answers there; start it"
    )
    assert line.endswith("; work is kept")


def test_a_run_left_open_is_under_way_until_it_is_gone_on_with(store: str) -> None:
    use_store(store)
    with tracking.start_run("long") as run:
        pass
    tracking.leave_open(run)
    assert mlflow.get_run(run).info.status == "RUNNING"
    assert mlflow.active_run() is None
    with tracking.go_on_with(run):
        tracking.log_metrics({"accuracy": 0.5})
    ended = mlflow.get_run(run)
    assert (ended.info.status, ended.data.metrics) == ("FINISHED", {"accuracy": 0.5})
    with tracking.start_run("other") as run:
        pass
    tracking.leave_open(run)
    tracking.give_up(run)
    assert mlflow.get_run(run).info.status == "FAILED"


def test_links_name_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "experiment_id", lambda: "7")
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "https://me:secret@host/mlflow/")
    assert tracking.link(["a"]) == "https://host/mlflow/#/experiments/7/runs/a?workflowType=machine_learning"
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "postgresql://me:secret@host/mlflow")
    assert "secret" not in tracking.link(["a", "b"])
    assert "--backend-store-uri postgresql://me@host/mlflow" in tracking.link(["a", "b"])


def test_a_job_is_a_parent_run_with_a_child_for_each_policy_and_task(store: str, tmp_path: Path) -> None:
    asked = {TRAINING: json.dumps({"s2t-local": {"read": 1200, "written": 34}})}
    results = recorded_results(tmp_path / "results.parquet", **asked)
    tables, _ = report(results, tmp_path, store)
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT])
    parent = runs[runs["tags.s2t.stage"] == "benchmark"].iloc[0]
    children = runs[runs["tags.mlflow.parentRunId"] == parent["run_id"]].set_index("params.policy")
    assert sorted(children.index) == sorted(["greedy", "s2t", "s2t@0.05", "s2t-local", "takeover", "llm"])
    local = children.loc["s2t-local"]
    assert local["metrics.accuracy_low"] < local["metrics.accuracy"] < local["metrics.accuracy_high"]
    counts = [local[f"metrics.{verdict}"] for verdict in ("correct", "wrong", "truncated", "errored")]
    assert sum(counts) == 80
    gain = local["metrics.accuracy"] - children.loc["greedy", "metrics.accuracy"]
    assert local["metrics.difference"] == pytest.approx(gain)
    assert (local["metrics.training_teacher_read"], local["metrics.training_teacher_written"]) == (1200, 34)
    assert pd.isna(children.loc["greedy", "metrics.training_teacher_read"])
    assert children.loc["s2t@0.05", "params.budget"] == "0.05"
    files = {file.path for file in mlflow.artifacts.list_artifacts(run_id=parent["run_id"])}
    assert {"recipe.json", "tables.md", "results.parquet", "splits.json", "tables", "figures"} <= files
    figures = {
        Path(file.path).name
        for file in mlflow.artifacts.list_artifacts(run_id=parent["run_id"], artifact_path="figures")
    }
    assert {"embedded-accuracy.png", "embedded-flips.png", "embedded-accuracy-budget.png"} <= figures
    (line,) = (line for line in tables.splitlines() if line.startswith("| s2t-local ") and "1,200" in line)
    assert "34" in [cell.strip() for cell in line.split("|")]
    assert line in (tmp_path / "tables.md").read_text()


def test_flips_name_the_items(store: str, tmp_path: Path) -> None:
    report(recorded_results(tmp_path / "results.parquet"), tmp_path, store)
    parent = mlflow.search_runs(filter_string="tags.`s2t.stage` = 'benchmark'", search_all_experiments=True).iloc[0]
    flips = mlflow.artifacts.load_dict(f"{parent['artifact_uri']}/tables/flips.json")
    rows = [dict(zip(flips["columns"], row, strict=True)) for row in flips["data"]]
    assert all(row["right"] != row["wrong"] for row in rows)
    pairs = mlflow.artifacts.load_dict(f"{parent['artifact_uri']}/tables/comparisons.json")
    for values in pairs["data"]:
        pair = dict(zip(pairs["columns"], values, strict=True))
        own = [row for row in rows if (row["a"], row["b"]) == (pair["a"], pair["b"])]
        assert len(own) == pair["gained"] + pair["lost"]


def test_the_summary_has_the_names_and_figures_the_loop_promises(tmp_path: Path) -> None:
    from pipelines.results.summary import loop_summary, read_results

    frame, metadata = read_results(recorded_results(tmp_path / "r.parquet", {"s2t@0.05": "s2t-local-w0"}))
    summary = json.loads(json.dumps(loop_summary(frame, {1: 0.1, 8: 0.9}, 0.1, json.loads(metadata["s2t.splits"]))))
    assert set(summary) == {"policies", "paired", "hit", "budget", "seeds", "splits"}
    assert "s2t-local (w=0)" in summary["policies"]
    greedy = summary["policies"]["greedy"]
    assert set(greedy) == {"accuracy", "interval", "items", "tokens", "seconds"}
    assert greedy["interval"][0] < greedy["accuracy"] < greedy["interval"][1]
    there, back = summary["paired"]["s2t-local-greedy"], summary["paired"]["greedy-s2t-local"]
    assert there["difference"] == pytest.approx(-back["difference"])
    assert there["difference"] == pytest.approx(summary["policies"]["s2t-local"]["accuracy"] - greedy["accuracy"])
    assert summary["hit"] == {"1": 0.1, "8": 0.9}
    assert summary["seeds"] == [0, 1]
