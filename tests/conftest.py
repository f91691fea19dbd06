"""Session fixtures: one real Ray cluster for all tests, with more logical CPUs than cores (the actors are small)."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers are nice to other processes, and the tests that need no cluster, which run beside, would starve them.
os.environ.setdefault("RAY_worker_niceness", "0")
# Of the object store that `object_store` starts. Ray's processes inherit them from the first cluster on.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


#: Fixtures that need the session's cluster: what uses one is marked `cluster`. A module that starts clusters itself has
#: the mark already.
OF_THE_CLUSTER = {"ray_cluster", "endpoint", "object_store"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if OF_THE_CLUSTER & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session", autouse=True)
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The store of every job that is given no other, and of the processes that tests start; the user's is left
    alone."""
    store = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", store)
        yield store


def _store_put_back(mlflow_store: str) -> Iterator[None]:
    """A job that is given a store of its own points the environment at it, for its child processes: what comes after
    goes by what was there before."""
    before = os.environ["MLFLOW_TRACKING_URI"]
    yield
    os.environ["MLFLOW_TRACKING_URI"] = before


store_put_back_after_a_module = pytest.fixture(_store_put_back, scope="module", autouse=True)
store_put_back_after_a_test = pytest.fixture(_store_put_back, autouse=True)


@pytest.fixture(scope="module")
def environment_put_back() -> Iterator[None]:
    """vLLM's engines are told by the environment, for good; commands that are tested later start without it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What nodes keep of fetched files, apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("S2T_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def store_address() -> Iterator[str]:
    """Where the object store answers, once `object_store` has started it."""
    from processes import free_port

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", address := f"http://127.0.0.1:{free_port()}")
        yield address


@pytest.fixture(scope="session")
def object_store(store_address: str) -> Iterator[str]:
    """A bucket of a real S3 server in a process of its own, as a URI."""
    import subprocess
    import sys

    from processes import wait_until
    from pyarrow.fs import S3FileSystem

    pytest.importorskip("moto", reason="the S3 server comes with the extra `dev`")
    port = store_address.rpartition(":")[2]
    command = [sys.executable, "-m", "moto.server", "-p", port]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_until(lambda: _answers(int(port)), server)
        S3FileSystem(endpoint_override=store_address, allow_bucket_creation=True).create_dir("runs")
        yield "s3://runs"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def google_store() -> Iterator[str]:
    """A bucket of a server that speaks as Google Cloud Storage does, as a URI."""
    import subprocess
    import sys

    from processes import free_port, wait_until

    pytest.importorskip("gcp_storage_emulator", reason="the server comes with the extra `dev`")
    port = free_port()
    run = "import sys; from gcp_storage_emulator.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "start", "--port", str(port), "--in-memory", "--default-bucket", "runs"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    try:
        wait_until(lambda: _answers(port), server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{port}")
            yield "gs://runs"
    finally:
        server.kill()
        server.wait()


def _answers(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def recipe_path() -> Path:
    return REPOSITORY / "cluster" / "recipes" / "embedded.yaml"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The benchmarks' real data, laid out as the README says; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("S2T_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the benchmark data is not at {folder}; set S2T_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def ray_cluster(own_cache: Path, store_address: str) -> Iterator[str]:
    """The cluster's dashboard address, where jobs are submitted."""
    import ray

    context = ray.init(address="local", num_cpus=8, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


@pytest.fixture(scope="session")
def untrained_artifact(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded SLM as an S2T-Local artifact nobody trained: its rows and its head are drawn at random, which is all
    that plumbing and exactness need. The recipe's budget triggers often."""
    from s2t_models.recipe import load_recipe

    recipe = load_recipe(recipe_path)
    budget = recipe.budget
    thresholds = {"head": {budget: 0.0}, "kl": {budget: 0.5}, "entropy": {budget: 0.5}}
    return _untrained(recipe, tmp_path_factory.mktemp("artifact") / "untrained", thresholds, 0)


@pytest.fixture(scope="session")
def other_artifact(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one, drawn otherwise and made with the settings OTHER; it has no thresholds of entropy."""
    from made_up import OTHER

    from s2t_models.recipe import load_recipe

    recipe = load_recipe(recipe_path, OTHER)
    thresholds = {"head": {recipe.budget: -0.1}, "kl": {recipe.budget: 0.4}}
    return _untrained(recipe, tmp_path_factory.mktemp("artifact") / "other", thresholds, 1)


def _untrained(recipe: Any, folder: Path, thresholds: dict[str, dict[float, float]], seed: int) -> Path:
    import torch
    from made_up import card

    from s2t_models import artifact, loading
    from s2t_models.reserved import reserved_rows
    from s2t_models.trigger import TriggerHead

    torch.manual_seed(seed)
    model, tokenizer = loading.load_model(recipe.slm), loading.load_tokenizer(recipe.slm)
    reserved = reserved_rows(recipe)
    with torch.no_grad():
        model.get_output_embeddings().weight[list(reserved)] = torch.randn(len(reserved), model.config.hidden_size)
    head = TriggerHead(model.config.hidden_size, 16).eval()
    return artifact.save(folder, model, tokenizer, head, card(recipe, thresholds)).folder


@pytest.fixture(scope="session")
def untrained_second_pass(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second pass of the embedded SLM that nobody trained."""
    from made_up import second_pass

    from s2t_models import loading
    from s2t_models.recipe import load_recipe

    slm = load_recipe(recipe_path).slm
    folder = tmp_path_factory.mktemp("tah")
    return second_pass(loading.load_model(slm), folder, base_weights=loading.weights_hash(slm))


@pytest.fixture(scope="session")
def endpoint(
    ray_cluster: str, recipe_path: Path, untrained_artifact: Path, other_artifact: Path, untrained_second_pass: Path
) -> str:
    """The URL (.../v1) of the embedded pair, two untrained artifacts and a second pass, served by real Serve for the
    whole session."""
    import socket

    from s2t_models.hosting import host
    from s2t_models.recipe import load_recipe
    from serving.app import run

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [f"artifact={untrained_artifact}", f"artifacts.other={other_artifact}"]
    settings += ["checkpoints.kd=embedded:slm", f"serving.port={port}"]
    settings += [f"tah={untrained_second_pass}", "policies.tah.threshold=0.35"]
    few = [f"{model}.num_cpus=0.1" for model in ("slm", "teacher")]
    return run(host(load_recipe(recipe_path, settings + few)), blocking=False)


@pytest.fixture(scope="session")
def items(recipe_path: Path) -> list[Any]:
    """The small benchmark job's tasks with their items."""
    from benchmark_jobs import job

    from pipelines.benchmark.questions import load_items

    return load_items(job(recipe_path), None)


@pytest.fixture
def stub(items: list[Any]) -> Iterator[Any]:
    """A stub endpoint that knows the answers of that job."""
    from stub_endpoint import stub_endpoint

    with stub_endpoint({item.question: str(item.answer) for _, drawn in items for item in drawn}) as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is asked again at once."""
    monkeypatch.setattr("pipelines.benchmark.asking.FIRST_DELAY_S", 0.01)
