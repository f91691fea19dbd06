"""The stages with their inputs and outputs in an object store: collect, distil, benchmark and analyse on s3://."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from benchmark_jobs import job, run
from processes import start, wait_until
from stub_endpoint import Stub

from pipelines.analyse.__main__ import main as analyse_main
from pipelines.collect.__main__ import main as collect_main
from pipelines.collect.job import collect
from pipelines.data.layout import COLLECTED, RESULTS
from pipelines.data.shards import read_shards, shards_digest
from pipelines.data.sink import committed
from pipelines.distil.inputs import training_folder
from pipelines.distil.job import distil
from pipelines.results.summary import read_results
from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.embedded import generator
from s2t_models.engines.contract import Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import LOCAL, host
from s2t_models.locks import locked
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.storage import ObjectPath, is_uri

SETTINGS = [
    "collect.writer=slm",
    "collect.max_new_tokens=60",
    *(f"collect.{stage}.{setting}" for stage in ("rollout", "label") for setting in ("batch=4", "num_cpus=0.5")),
    *("distil.steps=4", "distil.evaluate_every=4", "distil.batch=4", "distil.lora.rank=4", "distil.validation=0.2"),
    *("trigger_head.epochs=2", "trigger_head.positives=0.2"),
]


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def prompts(object_store: str) -> ObjectPath:
    path = ObjectPath(object_store) / "prompts.jsonl"
    problems = generator.problems("train", 24)
    path.write_text("\n".join(json.dumps({"uid": p.uid, "prompt": p.question}) for p in problems))
    return path


def _options(recipe_path: Path, output: ObjectPath, prompts: ObjectPath) -> list[str]:
    overrides = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["--recipe", str(recipe_path), "--output", str(output), "--prompts", str(prompts), *overrides]


@pytest.fixture(scope="module")
def collection(
    ray_cluster: str, object_store: str, recipe: Recipe, recipe_path: Path, prompts: ObjectPath
) -> ObjectPath:
    """Begun by a process that was killed half-way, and finished by another."""
    import ray

    output = ObjectPath(object_store) / "train"
    command = ["-m", "pipelines.collect", *_options(recipe_path, output, prompts)]
    process = start(*command, RAY_ADDRESS=ray.get_runtime_context().gcs_address)
    folders = output / "work" / "labelled", output / "work" / "checkpoint"
    wait_until(lambda: bool(committed(*folders)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    written = {path: path.info().mtime_ns for path in committed(*folders)}
    assert not (output / COLLECTED).exists()
    assert written

    collect(recipe, output, prompts)
    return output


def test_a_killed_collection_goes_on_in_the_store(collection: ObjectPath, prompts: ObjectPath, capsys) -> None:
    table, _ = read_shards(collection)
    asked = [json.loads(line)["uid"] for line in prompts.read_text().splitlines()]
    assert table["uid"].to_pylist() == asked
    assert table["error"].null_count == len(asked)
    assert not (collection / "work").files()
    summary = json.loads((collection / COLLECTED).read_text())
    assert summary["rows"] == 24
    assert summary["kept_steps"] == sum(len(kept) for kept in table["kept"].to_pylist())


def test_a_second_job_is_refused_in_one_line(
    collection: ObjectPath, recipe_path: Path, prompts: ObjectPath, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(collection):
        assert collect_main(_options(recipe_path, collection, prompts)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"collect: {collection}: another job is at work there" in line


def test_a_store_that_does_not_answer_ends_the_command_in_one_line(
    collection: ObjectPath,
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"uid": "a", "prompt": "1 + 1"}')
    arguments = _options(recipe_path, collection, ObjectPath("s3://runs/none"))
    arguments[arguments.index("--prompts") + 1] = str(tmp_path / "prompts.jsonl")
    assert collect_main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the store cannot be reached; see that its address (AWS_ENDPOINT_URL_S3 for S3) is right" in line
    assert not list(tmp_path.glob("errors.log"))


@pytest.mark.slow
def test_an_artifact_is_trained_kept_and_served_from_the_store(collection: ObjectPath, recipe: Recipe) -> None:
    output = collection.parent / "artifact"
    done = distil(recipe, collection, output)
    assert done.shards == {"training": shards_digest(collection)}
    assert not training_folder(output).files()
    written = (output / "artifact.json").info().mtime_ns
    assert distil(recipe, collection, output) == done
    assert (output / "artifact.json").info().mtime_ns == written, "what is done is not done again"

    serving = recipe.model_copy(update={"artifact": str(output), "budget": 0.05})
    hosted = host(serving).engines[LOCAL]
    assert is_uri(str(hosted.artifact))
    engine = load(hosted)
    assert asyncio.run(engine.card()).weights == loading.weights_hash(Artifact.load(output).model(recipe.slm))
    draft = asyncio.run(engine.generate([5, 6, 7], Sampling(max_tokens=3)))
    assert len(draft.ids) == 3
    engine.close()


@pytest.mark.slow
def test_a_benchmark_resumes_and_is_analysed_in_the_store(
    ray_cluster: str,
    object_store: str,
    collection: ObjectPath,
    stub: Stub,
    recipe_path: Path,
    tmp_path: Path,
    quick: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pipelines.benchmark.job import Options, benchmark

    output = ObjectPath(object_store) / "benchmark"
    options = Options(endpoint=stub.url, tracking=f"sqlite:///{tmp_path}/mlflow.db")
    few = job(recipe_path, "benchmark.items=6", "benchmark.seeds=[0]")
    benchmark(few.model_copy(update={"benchmark": few.benchmark.model_copy(update={"items": 3})}), output, options)
    asked = stub.asked.total()
    tables, _ = benchmark(few, output, options)
    assert stub.asked.total() == 2 * asked
    frame, _ = read_results(output / RESULTS)
    assert len(frame) == 2 * asked
    timing = ["seconds", "client_seconds"]
    assert frame.drop(columns=timing).equals(run(few, tmp_path / "here", stub).drop(columns=timing))
    assert (output / "tables.md").read_text() == tables
    assert list((output / "figures").glob("*.png"))

    analysis = output.parent / "analysis"
    store = ["--tracking", f"sqlite:///{tmp_path}/mlflow.db"]
    assert analyse_main([str(output), str(collection), "--output", str(analysis), *store]) == 0
    assert (analysis / "hit.csv").read_text().startswith("tau,k,hit,steps")
    assert (analysis / "hit-over-k.png").is_file()
    assert str(analysis) in capsys.readouterr().out
