"""The trained baselines from the command line, on a handful of the embedded pair's own trajectories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_distil import label, write

from pipelines.benchmark.__main__ import main as benchmark
from pipelines.collect.__main__ import main as collect
from pipelines.data.layout import RESULTS, TABLES
from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil.__main__ import main as distil
from pipelines.results.summary import read_results, summarise
from s2t_models.artifact import Artifact, read_provenance
from s2t_models.provenance import Provenance
from s2t_models.recipe import load_recipe
from s2t_models.training.batches import split_by_prompt

pytestmark = pytest.mark.slow  # trainings on Ray take half a minute each

SETTINGS = (
    "distil.batch=4",
    "distil.steps=2",
    "distil.evaluate_every=2",
    "distil.lora.rank=4",
    "distil.validation=0.2",
    "distil.min_teacher_margin=0.1",
    "distil.num_cpus=0.5",
    "distil.workers=1",
    "trigger_head.epochs=1",
    "trigger_head.positives=0.2",
    "trigger.threshold=0.1",
    "collect.prompts=10",
    "collect.max_new_tokens=16",
    "collect.rollout.num_cpus=0.5",
    "collect.label.num_cpus=0.5",
    "slm.slots=8",
    "slm.context=256",
)


def made(where: Path) -> Provenance:
    found = read_provenance(where)
    assert found is not None
    return found


@pytest.fixture
def common(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # where errors.log goes
    return ["--recipe", str(recipe_path), *(part for setting in SETTINGS for part in ("--set", setting))]


def test_two_workers_train_on_their_own_texts_and_the_teacher_is_metered(
    ray_cluster: str, common: list[str], recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = load_recipe(recipe_path, SETTINGS)
    shards = write(tmp_path / "train", label(recipe, "embedded-train", 10), recipe, "embedded-train")
    more = ["--shards", str(shards), "--objective", "tsd-kd", "--output", str(tmp_path / "tsd-kd")]
    assert distil([*common, *more, "--set", "distil.workers=2"]) == 0
    asked = made(tmp_path / "tsd-kd").teacher
    assert asked is not None
    _, held_out = split_by_prompt(ShardTrajectories(shards), recipe.distil.validation, recipe.seed)
    labels = sum(len(item.tree.tokens) for item in held_out)
    prompts = min(item.tree.prompt for item in ShardTrajectories(shards))
    assert asked.written == 0
    assert asked.read > labels + 2 * 4 * prompts  # two steps of four texts, on both workers together
    assert f"{asked.read:,} tokens read for it, 0 written" in capsys.readouterr().out

    import mlflow

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("s2t").experiment_id])
    assert run.data.metrics["teacher/read"] == asked.read


def test_every_objective_from_prompts_to_the_table(ray_cluster: str, common: list[str], tmp_path: Path):
    train, texts = tmp_path / "train", tmp_path / "texts"
    assert collect([*common, "--output", str(train)]) == 0
    assert collect([*common, "--teacher", "--output", str(texts)]) == 0
    summary = json.loads((texts / "collect.json").read_text())
    assert summary["kept_steps"] == summary["steps"]
    outputs = {name: tmp_path / name for name in ("kd", "tsd-kd", "head-only", "pointwise", "listmle", "soft-labels")}
    for name, output in outputs.items():
        assert distil([*common, "--shards", str(train), "--objective", name, "--output", str(output)]) == 0
    refused = [*common, "--objective", "distil", "--output", str(tmp_path / "distil")]
    assert distil([*refused, "--shards", str(train)]) == 2
    assert distil([*refused, "--shards", str(texts)]) == 0
    outputs["distil"] = tmp_path / "distil"
    tokens = made(outputs["distil"]).teacher
    assert tokens is not None
    assert (tokens.read, tokens.written) == (summary["teacher_prefill"], summary["teacher_decode"])
    assert tokens.written == summary["steps"]

    named = [f"checkpoints.{name}={outputs[name]}" for name in ("kd", "distil", "tsd-kd")]
    for name in ("head-only", "pointwise", "listmle", "soft-labels"):
        assert Artifact.load(outputs[name]).card.provenance.teacher == made(outputs["kd"]).teacher
        named.append(f"artifacts.{name}={outputs[name]}")
    policies = ["greedy", "kd", "distil", "tsd-kd", *(f"s2t-local@0.1:{n}" for n in ("head-only", "listmle"))]
    settings = [*named, "benchmark.items=2", "benchmark.max_new_tokens=8", "slm.num_cpus=0.1", "teacher.num_cpus=0.1"]
    more = [part for setting in settings for part in ("--set", setting)]
    output = tmp_path / "bench"
    assert benchmark([*common, *more, "--policies", ",".join(policies), "--output", str(output)]) == 0
    training = {summary.policy: summary.training for summary in summarise(*read_results(output / RESULTS))}
    assert training["greedy"] is None
    assert training["distil"] == tokens.read + tokens.written
    assert training["kd"] == training["s2t-local@0.1:listmle"]
    assert f"{training['tsd-kd']:,}" in (output / TABLES).read_text()
