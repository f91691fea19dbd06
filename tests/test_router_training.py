"""R2R's router from real shards to the policy that uses it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from pipelines.collect.job import collect
from pipelines.distil.__main__ import main
from pipelines.distil.inputs import training_folder
from s2t_models import loading
from s2t_models.artifact import read_provenance
from s2t_models.engines.load import load
from s2t_models.hosting import host
from s2t_models.policies import policy
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.recipe import load_recipe
from s2t_models.router import load_router

SETTINGS = [
    "collect.writer=slm",
    "collect.prompts=24",
    "collect.max_new_tokens=48",
    "collect.rollout.num_cpus=0.5",
    "collect.label.num_cpus=0.5",
    "distil.num_cpus=0.5",
    "router.max_new_tokens=120",
    "router.width=32",
    "router.blocks=1",
    "router.epochs=5",
]


@pytest.fixture(scope="module")
def shards(ray_cluster, recipe_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("router") / "shards"
    collect(load_recipe(recipe_path, SETTINGS), folder)
    return folder


def test_the_router_is_trained_from_shards_and_decodes(ray_cluster, recipe_path, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    chosen = [part for setting in SETTINGS for part in ("--set", setting)]
    output = tmp_path / "router"
    arguments = ["--recipe", str(recipe_path), *chosen, "--shards", str(shards), "--output", str(output)]
    assert main([*arguments, "--objective", "router"]) == 0
    said, record = capsys.readouterr().out, read_provenance(output)
    assert "of 24 answers (0 failed)" in said
    assert record is not None
    assert record.teacher is not None
    assert record.teacher.read > 0
    assert f"{record.teacher.read:,} tokens read for it, {record.teacher.written:,} written" in said
    assert not training_folder(output).exists()
    steps = int(said.split("labelled")[1].split()[0])
    assert record.teacher.written > steps, "the answers, and what goes on from the SLM's tokens"
    few = [*arguments[:-1], str(tmp_path / "none"), "--set", "router.max_new_tokens=2"]
    assert main([*few, "--objective", "router"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after the lines of progress
    assert said.startswith("distil: embedded: router: ")
    assert said.endswith("label more prompts")
    router = load_router(output)
    assert 0.0 < router.settings.threshold < 1.0

    recipe = load_recipe(recipe_path, [*SETTINGS, f"router.path={output}"])
    tokenizer = loading.load_tokenizer(recipe.slm)
    hosting = host(recipe)
    slm, teacher = (load(hosting.engines[name]) for name in ("slm", "teacher"))
    engines = Engines({"slm": slm, "teacher": teacher}, tokenizer.decode, tokenizer.encode)
    message = [{"role": "user", "content": "Mia has 3 pens and buys 14 more. How many pens does Mia have?"}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    decoded = asyncio.run(gather(policy("r2r", hosting).decode(engines, Request(prompt, 40))))
    slm.close()
    teacher.close()
    assert len(decoded.ids) == 40 or decoded.finish == "end"
    values = np.array([decision.value for decision in decoded.decisions])
    assert (values >= router.settings.threshold).all()
    assert all(decision.chosen == decision.argmax for decision in decoded.decisions)
