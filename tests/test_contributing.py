"""CONTRIBUTING, followed: what it shows of a policy, an engine and an objective works as it stands, each in under 100
lines.

The task is in `test_docs.py`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from labelled_rows import disagreeing, labelled_rows
from reference_engine import encode, reference_engines, run, tiny_pair

from s2t_models.engines import load
from s2t_models.engines.contract import Engine
from s2t_models.hosting import host
from s2t_models.policies import KINDS, offer
from s2t_models.policies.base import Engines, Request
from s2t_models.recipe import load_recipe
from s2t_models.settings import SamplerSettings
from s2t_models.training.batches import trajectories
from s2t_models.training.objectives import OBJECTIVES
from s2t_models.training.trainer import Trainer

GUIDE = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


def followed(heading: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The first Python block under a heading, as a module of the name that the heading gives."""
    section = GUIDE.read_text().split(f"## {heading}")[1].split("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len(code.splitlines()) < 100
    name = "contributed_" + heading.split()[-1]
    path = folder / f"{name}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_a_policy(tmp_path, monkeypatch, recipe_path):
    module = followed("Adding a policy", tmp_path, monkeypatch)
    monkeypatch.setattr("s2t_models.policies.KINDS", [*KINDS, module])
    offered, _ = offer(host(load_recipe(recipe_path)))
    policy = offered["second-thoughts"]
    engines, prompt = reference_engines(tiny_pair()), encode("Ada has 12 ")
    warm = SamplerSettings(temperature=0.9)
    decoded = run(type(policy)("second-thoughts", warm), engines, Request(prompt, 12, seed=2))

    def mean_logprob(ids: list[int]) -> float:
        steps = [engines["teacher"].logprobs(prompt + ids[:t])[token] for t, token in enumerate(ids)]
        return float(np.mean(steps))

    texts = [
        run(type(offered["sample"])("sample", "slm", warm), engines, Request(prompt, 12, seed)).ids for seed in (4, 5)
    ]
    assert texts[0] != texts[1]
    assert decoded.ids == max(texts, key=mean_logprob)
    assert set(decoded.usage) == {"slm", "teacher"}


def test_an_engine(tmp_path, monkeypatch, recipe_path):
    module = followed("Adding an engine", tmp_path, monkeypatch)
    monkeypatch.setitem(load.ENGINES, "recite", load.EngineKind(module.__name__))
    hosting = host(load_recipe(recipe_path, ["slm.engine=recite"]))
    offered, refused = offer(hosting)
    assert {"greedy", "takeover-random", "llm"} <= set(offered)
    assert refused["multiplex"] == "multiplex needs multiplex of slm, which a recite engine does not have here"
    assert "needs entropy of slm" in refused["s2t-entropy"] or "no entropy threshold" in refused["s2t-entropy"]
    engine = load.load(hosting.slm)
    assert isinstance(engine, Engine)
    decoded = run(offered["greedy"], Engines({"slm": engine}, str, list), Request([5, 6, 7], 8))
    assert decoded.ids == [5, 6, 7, *asyncio.run(engine.card()).end_ids]
    assert decoded.finish == "end"


def test_an_objective(tmp_path, monkeypatch, recipe_path):
    module = followed("Adding an objective", tmp_path, monkeypatch)
    monkeypatch.setitem(OBJECTIVES, "soft", f"{module.__name__}:SoftObjective")
    settings = ["distil.steps=12", "distil.batch=4", "distil.validation=0.2", "distil.min_teacher_margin=0"]
    recipe = load_recipe(recipe_path, [*settings, "distil.learning_rate=1e-3", "distil.beta=1", "distil.warmup=0"])
    data = trajectories(disagreeing(labelled_rows(recipe, "embedded-train", 8)))
    trainer = Trainer(recipe, "soft", data)
    trainer.wrapped.eval()
    first = trainer.evaluate()
    steps = [trainer.advance() for _ in range(12)]
    assert steps[-1]["soft_loss"] < 0.9 * steps[0]["soft_loss"]
    assert steps[0]["loss"] == pytest.approx(steps[0]["soft_loss"] + steps[0]["kl_loss"], rel=1e-5)
    assert trainer.evaluate()["kl_to_base"] > first["kl_to_base"]
