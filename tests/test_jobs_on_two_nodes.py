"""Every stage as a submitted job on a cluster of two nodes and a head, in the order of the loop."""

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
from processes import REPOSITORY, free_port

from pipelines.data.layout import RESULTS
from pipelines.data.shards import read_shards
from pipelines.results.summary import read_results
from s2t_models.artifact import Artifact, read_provenance
from s2t_models.router import SETTINGS

SMALL = {
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
    "router.max_new_tokens": 60,
    "router.width": 32,
    "router.blocks": 1,
    "router.epochs": 2,
    "slm.num_cpus": 0.5,
}


@pytest.fixture
def nodes() -> Iterator[Raylets]:
    raylets = Raylets(nodes=2, cpus=3, dashboard=True)
    yield raylets
    raylets.close()


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


@pytest.mark.slow
def test_the_stages_as_submitted_jobs(nodes: Raylets, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/mlflow.db"
    recipe = ["--recipe", "embedded", *(part for key, value in SMALL.items() for part in ("--set", f"{key}={value}"))]
    train, calibration, bench = tmp_path / "train", tmp_path / "calibration", tmp_path / "bench"
    assert "24 rows" in submit(nodes, store, "collect", *recipe, "--output", train)
    submit(nodes, store, "collect", *recipe, "--calibration", "--output", calibration)
    assert len(read_shards(train)[0]) == 24
    assert len(read_shards(calibration)[0]) == 8

    shards = ["--shards", train]
    artifact, control, router = (tmp_path / name for name in ("artifact", "kd", "router"))
    one, two = ([*shards, "--set", f"distil.workers={workers}"] for workers in (1, 2))
    submit(nodes, store, "distil", *recipe, *two, "--calibration", calibration, "--output", artifact)
    submit(nodes, store, "distil", *recipe, *one, "--objective", "kd", "--output", control)
    submit(nodes, store, "distil", *recipe, *shards, "--objective", "router", "--output", router)
    assert Artifact.load(artifact).card.provenance.validation["step"] in (3, 6)
    assert read_provenance(control) is not None
    assert (router / SETTINGS).is_file()

    trained = ["--set", f"artifact={artifact}", "--set", f"checkpoints.kd={control}"]
    asked = ["--items", "3", "--seeds", "0", "--policies", "greedy,s2t-local,kd"]
    asked += ["--set", f"serving.port={free_port()}"]
    assert "greedy" in submit(nodes, store, "benchmark", *recipe, *trained, *asked, "--output", bench)
    frame = read_results(bench / RESULTS)[0]
    assert len(frame) == 9
    assert frame["error"].isna().all()

    submit(nodes, store, "analyse", train, bench / RESULTS, "--output", tmp_path / "analysis")
    assert list((tmp_path / "analysis").glob("*.csv"))

    import mlflow

    client = mlflow.MlflowClient(store)
    experiment = client.get_experiment_by_name("s2t")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    stages = [run.data.tags.get("s2t.stage") for run in runs]
    assert {stage: stages.count(stage) for stage in ("collect", "distil", "benchmark", "analyse")} == {
        "collect": 2,
        "distil": 3,
        "benchmark": 1,
        "analyse": 1,
    }
