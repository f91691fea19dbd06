"""Model versions in a real store: what is registered is found by its weights and served by its name, and nothing else
is."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import mlflow
import pytest
import torch
from made_up import OTHER, provenance
from recorded import recorded_results, recorded_shards

from pipelines.collect.runs import log_collection
from pipelines.data.shards import shards_digest
from pipelines.distil.follower import Follower
from pipelines.distil.runs import log_trained
from pipelines.results.report import report
from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.hosting import host
from s2t_models.recipe import Recipe, RecipeError, load_recipe
from s2t_models.router import Router, RouterConfig, save_router
from serving.app import chosen, main
from serving.registry import RegistryError, recipe_of, register, weights_of
from serving.store import EXPERIMENT, StoreError, use_store

URI = "models:/embedded-selector/1"
SUMMARY = {
    "rows": 13,
    "errors": {"empty prompt": 1},
    "steps": 720,
    "kept_steps": 96,
    "teacher_prefill": 744,
    "teacher_decode": 0,
    "agreement": 0.9,
    "least_kl": 0.5,
    "hit": {"1": 0.25, "8": 0.75},
    "kl_quantiles": {"0.99": 3.0},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        use_store()
        yield uri


@pytest.fixture(scope="module")
def trained(untrained_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that a test may delete."""
    return Path(shutil.copytree(untrained_artifact, tmp_path_factory.mktemp("trained") / "artifact"))


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


@pytest.fixture(scope="module")
def jobs(
    store: str, recipe: Recipe, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, mlflow.entities.Run], str]:
    """The runs, by name, of a collection, a training on it and a benchmark of what was trained, each done twice but the
    last; and the benchmark's link."""
    folder = tmp_path_factory.mktemp("jobs")
    recorded_shards(folder / "train")
    for name in ("thresholds.json", "collect.json"):
        (folder / "train" / name).write_text("{}")
    metadata = {"s2t.task": "embedded-train", "s2t.divergence": str(recipe.divergence)}
    digest = shards_digest(folder / "train")
    done = Artifact.load(trained).card.provenance.model_copy(
        update={"shards": {"training": digest}, "validation": {"agree_at_1": 0.75}}
    )
    for _ in range(2):
        log_collection(recipe, folder / "train", metadata, SUMMARY)
        curves = Follower(folder / "curves")
        log_trained(recipe, done, trained, {"training": folder / "train"}, folder / "training", curves, None)
    weights = loading.weights_hash(Artifact.load(trained).model(recipe.slm))
    _, link = report(recorded_results(folder / "results.parquet", weights=weights), folder, store)
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT], output_format="list")
    assert len({run.info.run_name for run in runs}) == len(runs), "a job that is done again is not logged again"
    return {run.info.run_name: mlflow.get_run(run.info.run_id) for run in runs}, link


def test_the_experiment_opens_with_runs_not_traces(jobs: object) -> None:
    tags = mlflow.get_experiment_by_name(EXPERIMENT).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_experiment_of_an_older_store_gets_its_kind_and_one_that_was_chosen_stays(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    client.create_experiment(EXPERIMENT)
    use_store(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    client.set_experiment_tag(experiment.experiment_id, "mlflow.experimentKind", "finetuning")
    use_store(uri)
    assert client.get_experiment_by_name(EXPERIMENT).tags["mlflow.experimentKind"] == "finetuning"
    use_store(before)


def test_a_collection_is_a_run_with_its_figures(jobs: tuple[dict[str, mlflow.entities.Run], str]) -> None:
    run = jobs[0]["collect embedded-train"]
    metrics = run.data.metrics
    assert (metrics["hit_1"], metrics["hit_8"], metrics["errors"], metrics["kl_quantile_0.99"]) == (0.25, 0.75, 1, 3)
    assert (metrics["teacher_prefill"], metrics["teacher_decode"]) == (12 * 62, 0)  # 2 tokens of prompt, 60 of answer
    assert run.data.params["collect.k"]
    assert {"thresholds.json", "collect.json"} <= {
        f.path for f in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)
    }


def test_lineage_goes_from_the_collection_to_the_version_to_the_benchmark(
    jobs: tuple[dict[str, mlflow.entities.Run], str], trained: Path
) -> None:
    runs, _ = jobs
    (collected,), (used,) = (runs[name].inputs.dataset_inputs for name in ("collect embedded-train", "distil-selector"))
    assert (used.dataset.name, used.dataset.digest) == (collected.dataset.name, collected.dataset.digest)
    assert used.tags[0].value == "training"
    assert json.loads(used.dataset.source)["uri"].endswith("train")
    version = mlflow.MlflowClient().get_model_version("embedded-selector", "1")
    model = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert model.source_run_id == runs["distil-selector"].info.run_id
    assert {metric.key: metric.value for metric in model.metrics}["best/agree_at_1"] == 0.75
    assert version.tags["s2t.training"].startswith(used.dataset.digest)
    assert version.tags["s2t.recipe"] == Artifact.load(trained).card.provenance.recipe
    assert version.tags["s2t.budget"] == "0.1"
    assert version.tags["s2t.objective"] == "selector"
    local, other = runs["s2t-local on embedded"], runs["greedy on embedded"]
    assert [used.model_id for used in local.inputs.model_inputs] == [model.model_id]
    assert local.data.tags["s2t.models"] == URI
    assert not other.inputs.model_inputs
    (rows,) = local.inputs.dataset_inputs
    assert (rows.dataset.name, rows.dataset.digest) == ("embedded", "abc")
    on_rows = {metric.key: metric.dataset_name for metric in model.metrics}
    assert on_rows["accuracy"] == "embedded"


def test_the_link_names_the_policies_runs(jobs: tuple[dict[str, mlflow.entities.Run], str]) -> None:
    runs, link = jobs
    url, command = link.split("\n")
    parameters = httpx.QueryParams(url.partition("?")[2])
    assert url.startswith("http://127.0.0.1:5000/#/compare-runs?")
    assert set(json.loads(parameters["runs"])) == {
        run.info.run_id for name, run in runs.items() if name.endswith(" on embedded")
    }
    assert json.loads(parameters["experiments"]) == [mlflow.get_experiment_by_name(EXPERIMENT).experiment_id]
    assert "mlflow ui --backend-store-uri sqlite:///" in command


def test_a_version_is_served_by_its_name_without_the_folder_it_came_from(
    jobs: object, recipe: Recipe, trained: Path, untrained_artifact: Path, recipe_path: Path
) -> None:
    before = (untrained_artifact / "artifact.json").read_bytes()
    shutil.rmtree(trained)
    served = recipe_of([URI], overrides=["budget=0.05"])
    hosting = host(served)
    assert served.budget == 0.05
    assert served.slm == recipe.slm
    folder = hosting.engines["s2t-local"].artifact
    assert (folder / "artifact.json").read_bytes() == before
    mlflow.MlflowClient().set_registered_model_alias("embedded-selector", "best", "1")
    mine = chosen(["models:/embedded-selector@best"], str(recipe_path), ["seed=3"])
    assert (mine.artifact, mine.seed) == (str(folder), 3)
    shutil.copytree(folder, trained)


def test_a_plain_checkpoint_becomes_one_of_the_recipes(jobs: object, recipe: Recipe, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loading.resolve(recipe.teacher), tmp_path / "kd"))
    made = provenance(objective="kd", base_weights=loading.weights_hash(recipe.slm))
    made.write(folder)
    with mlflow.start_run():
        version = register(recipe.model_copy(update={"name": "a/b:c-2.5"}), folder, made)
    assert version.uri == "models:/a-b-c-2-5-kd/1"
    served = recipe_of([version.uri])
    assert host(served).engines["kd"].settings.path == served.checkpoints["kd"]
    assert loading.weights_hash(host(served).engines["kd"].settings) == loading.weights_hash(recipe.teacher)


def test_versions_are_served_side_by_side(
    jobs: object, recipe_path: Path, trained: Path, other_artifact: Path, tmp_path: Path
) -> None:
    made = load_recipe(recipe_path, OTHER)
    routers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_router(Router(RouterConfig(hidden=8, width=8, blocks=1)), tmp_path / str(seed))
        record = provenance(objective="router", base_weights=loading.weights_hash(made.slm))
        record.write(tmp_path / str(seed))
        with mlflow.start_run():
            routers.append(register(made, tmp_path / str(seed), record).uri)
    with mlflow.start_run():
        new = register(made, other_artifact, Artifact.load(other_artifact).card.provenance).uri
    assert [new, *routers] == [URI.replace("1", "2"), "models:/embedded-router/1", "models:/embedded-router/2"]

    hosting = host(recipe_of([URI, routers[0], new, routers[1]]))
    assert hosting.recipe.policies == load_recipe(recipe_path).policies
    named = ("s2t-local", "s2t-local:embedded-selector-2", "slm", "slm:embedded-router-2")
    assert set(hosting.engines) == {"teacher", *named}
    folders = [hosting.engines[name].artifact or hosting.engines[name].router for name in named]
    weights = [weights_of(folder, hosting.recipe) for folder in folders]
    assert weights == [weights_of(folder, made) for folder in (trained, other_artifact, tmp_path / "0", tmp_path / "1")]
    turned = host(recipe_of([new, URI]))
    assert (turned.recipe.policies, set(turned.artifacts)) == (made.policies, {"embedded-selector-1"})
    for uris, overrides, message in (
        ([URI, new, URI], [], f"{URI}: is named twice"),
        ([URI, new], ["artifacts.embedded-selector-2=x"], f"{new}: the recipe has artifacts.embedded-selector-2 alr"),
    ):
        with pytest.raises(RegistryError, match=message):
            recipe_of(uris, overrides=overrides)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nonesuch/1", "models:/nonesuch/1: .*not found.*; registered in sqlite:.*: .*embedded-selector"),
        ("models:/embedded-selector/9", "models:/embedded-selector/9: .*not found"),
        ("models:/embedded-selector@nobody", "alias nobody not found"),
        ("embedded-selector", "names no version; write models:/NAME/VERSION"),
    ],
)
def test_a_version_that_is_not_there(jobs: object, uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message) as refused:
        recipe_of([uri])
    assert "\n" not in str(refused.value)


def test_serve_says_in_one_line_what_it_cannot_serve(
    jobs: object,
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([URI, "--recipe", str(recipe_path), "--set", "slm.path=embedded:teacher"]) == 2
    assert "was made with another SLM" in capsys.readouterr().err
    assert main([]) == 2
    assert "give --recipe FILE, or models:/NAME/VERSION" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none/mlflow.db")
    assert main([URI]) == 2
    assert "there is no such file; name the store in MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    with pytest.raises(RecipeError):
        chosen([], None, [])
    with pytest.raises(StoreError):
        recipe_of([URI])


def test_a_foreign_version_is_refused(jobs: object) -> None:
    client = mlflow.MlflowClient()
    client.create_registered_model("foreign")
    client.create_model_version("foreign", "s3://bucket/model")
    with pytest.raises(RegistryError, match=r"is no model that `s2t distil` registered \(its source is s3:"):
        recipe_of(["models:/foreign/1"])


@contextmanager
def mlflow_server(store: str, tmp_path: Path) -> Iterator[str]:
    """An MLflow server of the store, which keeps the files of new experiments itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = f"-m mlflow server --backend-store-uri {store} --artifacts-destination {tmp_path}/kept"
    options = f"--host 127.0.0.1 --port {port} --workers 1"
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # seven processes that nothing here asks
    with (tmp_path / "server.log").open("w") as log:
        arguments = [sys.executable, *command.split(), *options.split()]
        process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_a_version_of_a_server_is_downloaded_once(
    recipe: Recipe, untrained_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with mlflow_server(f"sqlite:///{tmp_path}/mlflow.db", tmp_path) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
        use_store()
        with mlflow.start_run():
            version = register(recipe, untrained_artifact, Artifact.load(untrained_artifact).card.provenance)
        fetched = recipe_of([version.uri])
        stamp = Path(fetched.artifact).stat().st_ctime_ns
        assert recipe_of([version.uri]) == fetched
    assert (tmp_path / "runs" / "models") in Path(fetched.artifact).parents
    assert Path(fetched.artifact).stat().st_ctime_ns == stamp
    host(fetched)


@pytest.mark.slow
def test_the_link_opens_the_policies_side_by_side_in_a_browser(
    store: str, jobs: tuple[dict[str, mlflow.entities.Run], str], tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here to open the page with")
    runs, link = jobs

    def opened(page: str) -> str:
        options = "--headless=new --no-sandbox --disable-gpu --virtual-time-budget=30000"
        command = [browser, *options.split(), f"--user-data-dir={tmp_path}/browser", "--dump-dom", page]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    with mlflow_server(store, tmp_path) as server:
        compared = opened(link.split("\n")[0].replace("http://127.0.0.1:5000", server))
        experiment = next(iter(runs.values())).info.experiment_id
        listed = opened(f"{server}/#/experiments/{experiment}?workflowType=machine_learning")
    assert "Comparing 6 Runs" in compared
    assert all(name in compared for name in runs if name.endswith(" on embedded"))
    assert "distil-selector" in listed
    assert "collect embedded-train" in listed
