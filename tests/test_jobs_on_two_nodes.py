"""Every stage as a submitted job on a cluster of two nodes and a head. Trainings and analyses read collections that
were made without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.raylets import Raylets
from faults.stages import prepare
from processes import REPOSITORY, free_port

from pipelines.data.layout import RESULTS
from pipelines.data.shards import read_shards
from pipelines.results.summary import read_results
from s2t_models.artifact import Artifact, read_provenance
from s2t_models.router import SETTINGS

SMALL = {
    "trigger.threshold": 0.1,
    "collect.prompts": 24,
    "collect.max_new_tokens": 48,
    "collect.rollout.batch": 8,
    "collect.label.batch": 8,
    "collect.rollout.num_cpus": 0.5,
    "collect.label.num_cpus": 0.5,
    "calibration.prompts": 8,
    "distil.steps": 6,
    "distil.evaluate_every": 3,
    "distil.batch": 4,
    "distil.lora.rank": 4,
    "distil.validation": 0.2,
    "distil.min_teacher_margin": 0,
    "trigger_head.epochs": 2,
    "trigger_head.positives": 0.2,
    "router.max_new_tokens": 120,
    "router.width": 32,
    "router.blocks": 1,
    "router.epochs": 2,
    "slm.num_cpus": 0.5,
}


RECIPE = ["--recipe", "embedded", *(part for key, value in SMALL.items() for part in ("--set", f"{key}={value}"))]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Raylets]:
    raylets = Raylets(nodes=2, cpus=3, dashboard=True)
    yield raylets
    raylets.close()


@pytest.fixture(scope="module")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` and `calibration`."""
    folder = tmp_path_factory.mktemp("collections")
    prepare(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def submit(nodes: Raylets, store: str, name: str, *arguments: str | Path) -> str:
    """What the job says; it must end well."""
    environment = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"}})
    command = [
        *(Path(sys.executable).with_name("ray"), "job", "submit", "--address", nodes.dashboard),
        *("--working-dir", REPOSITORY, "--runtime-env-json", environment, "--"),
        *(sys.executable, "-m", f"pipelines.{name}", *map(str, arguments)),
    ]
    elsewhere = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    for _ in range(10):
        submitted = subprocess.run(command, env=elsewhere, capture_output=True, text=True)
        if "No available agent" not in submitted.stderr:  # Ray's job agent is slow to answer on a busy machine
            break
        time.sleep(5)
    assert submitted.returncode == 0, submitted.stdout[-3000:] + submitted.stderr[-3000:]
    return submitted.stdout


def finished_runs(store: str, stage: str) -> int:
    """How many runs of a stage that ended well are in the store."""
    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("s2t")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    return sum(run.data.tags.get("s2t.stage") == stage for run in runs)


@pytest.mark.slow
def test_collections(nodes: Raylets, store: str, tmp_path: Path) -> None:
    train, calibration = tmp_path / "train", tmp_path / "calibration"
    assert "24 rows" in submit(nodes, store, "collect", *RECIPE, "--output", train)
    submit(nodes, store, "collect", *RECIPE, "--calibration", "--output", calibration)
    assert len(read_shards(train)[0]) == 24
    assert len(read_shards(calibration)[0]) == 8
    assert finished_runs(store, "collect") == 2


@pytest.mark.slow
def test_an_artifact_by_two_workers(nodes: Raylets, collections: Path, store: str, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shards = ["--shards", collections / "train", "--calibration", collections / "calibration"]
    submit(nodes, store, "distil", *RECIPE, *shards, "--set", "distil.workers=2", "--output", artifact)
    assert Artifact.load(artifact).card.provenance.validation["step"] in (3, 6)
    assert finished_runs(store, "distil") == 1


@pytest.mark.slow
def test_a_control_and_a_router(nodes: Raylets, collections: Path, store: str, tmp_path: Path) -> None:
    control, router, shards = tmp_path / "kd", tmp_path / "router", ["--shards", collections / "train"]
    one = ["--set", "distil.workers=1"]
    submit(nodes, store, "distil", *RECIPE, *shards, *one, "--objective", "kd", "--output", control)
    submit(nodes, store, "distil", *RECIPE, *shards, "--objective", "router", "--output", router)
    assert read_provenance(control) is not None
    assert (router / SETTINGS).is_file()
    assert finished_runs(store, "distil") == 2


@pytest.mark.slow
def test_a_benchmark_and_an_analysis(
    nodes: Raylets, collections: Path, untrained_artifact: Path, store: str, tmp_path: Path
) -> None:
    bench = tmp_path / "bench"
    asked = ["--items", "3", "--seeds", "0", "--policies", "greedy,s2t-local"]
    asked += ["--set", f"artifact={untrained_artifact}", "--set", f"serving.port={free_port()}"]
    assert "greedy" in submit(nodes, store, "benchmark", *RECIPE, *asked, "--output", bench)
    frame = read_results(bench / RESULTS)[0]
    assert len(frame) == 6
    assert frame["error"].isna().all()
    submit(nodes, store, "analyse", collections / "train", bench / RESULTS, "--output", tmp_path / "analysis")
    assert list((tmp_path / "analysis").glob("*.csv"))
    assert [finished_runs(store, stage) for stage in ("benchmark", "analyse")] == [1, 1]
