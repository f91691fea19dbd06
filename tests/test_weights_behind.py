"""Which weights an answer names, and that a benchmark's results count as done only while the recipe's folders hold
those."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest
from recorded import recorded_results
from reference_engine import card

from pipelines.benchmark.endpoint import served_models
from pipelines.benchmark.job import is_done
from pipelines.data.layout import RESULTS
from pipelines.results.summary import read_results, write_results
from s2t_models.artifact import ADAPTER, ADAPTER_WEIGHTS, MODEL
from s2t_models.engines.load import weights_behind
from s2t_models.hosting import trained_folders
from s2t_models.loading import resolve
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.router import WEIGHTS, Router, RouterConfig, save_router
from s2t_models.second_pass import DECIDER, SecondPass
from serving.registry import weights_of

SMALL = RouterConfig(hidden=8, support=4, width=8, blocks=1)


def test_an_answer_names_the_weights_that_its_policy_used() -> None:
    slm = replace(card("slm:mine"), weights="w", router="r", second_pass="s")
    assert weights_behind(slm, frozenset({"route"})) == {"slm:mine": "w", "slm:mine.router": "r"}
    assert weights_behind(slm, frozenset({"second_pass"})) == {"slm:mine": "w", "slm:mine.second_pass": "s"}
    assert weights_behind(slm, frozenset()) == {"slm:mine": "w"}


def test_the_endpoint_says_what_a_second_pass_is_and_a_benchmark_keeps_answers_under_it(
    endpoint: str, recipe_path: Path, untrained_second_pass: Path
) -> None:
    second, models = SecondPass.load(untrained_second_pass).weights_hash, {}
    for name in ("tah", "greedy"):
        body = {"model": name, "messages": [{"role": "user", "content": "2 + 3 = ?"}], "max_tokens": 2}
        answer = httpx.post(f"{endpoint}/chat/completions", json=body, timeout=120).json()
        models[name] = answer["s2t"]["models"]
    assert models["tah"] == models["greedy"] | {"slm.second_pass": second}
    assert models["greedy"].keys() == {"slm"}
    assert served_models(endpoint, ["tah"])["tah"]["engines"]["slm"]["second_pass"] == second


@pytest.fixture
def recipe(recipe_path: Path, untrained_artifact: Path, untrained_second_pass: Path, tmp_path: Path) -> Recipe:
    """One that names something of every kind."""
    save_router(Router(SMALL), tmp_path / "router")
    save_router(Router(SMALL), tmp_path / "mine")
    shutil.copytree(untrained_artifact, tmp_path / "artifact")
    shutil.copytree(untrained_second_pass, tmp_path / "tah")
    shutil.copytree(resolve(load_recipe(recipe_path).slm), tmp_path / "kd")
    keys = ("artifact", "checkpoints.kd", "router.path", "routers.mine", "tah")
    return load_recipe(recipe_path, [f"{key}={tmp_path / key.removesuffix('.path').split('.')[-1]}" for key in keys])


def test_results_are_done_while_all_that_answered_is_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    output, folders = tmp_path / "out", {name: Path(folder) for name, folder in trained_folders(recipe).items()}
    output.mkdir()
    metadata = read_results(recorded_results(output / RESULTS, **{"s2t.recipe": recipe.model_dump_json()}))[1]
    models = json.dumps({name: weights_of(folder, recipe) for name, folder in folders.items()} | {"teacher": "t"})
    rows = [row | {"models": models} for row in pq.read_table(output / RESULTS).to_pylist()]
    write_results(output / RESULTS, rows, metadata)
    assert is_done(recipe, output)
    weights = {
        "s2t-local": Path(MODEL, "model.safetensors"),
        "kd": Path("model.safetensors"),
        "slm.router": Path(WEIGHTS),
        "slm:mine.router": Path(WEIGHTS),
        "slm.second_pass": Path(ADAPTER, ADAPTER_WEIGHTS),
    }
    assert folders.keys() == weights.keys()
    for name, file in weights.items():
        path = folders[name] / file
        kept = path.read_bytes()
        path.write_bytes(kept + b"changed")
        assert not is_done(recipe, output), name
        path.write_bytes(kept)
        assert is_done(recipe, output)
    decider = folders["slm.second_pass"] / DECIDER / WEIGHTS
    decider.write_bytes(decider.read_bytes() + b"changed")
    assert not is_done(recipe, output)
