"""Benchmark jobs for tests: a small recipe, and a run of it against the stub endpoint."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from stub_endpoint import Stub

from pipelines.benchmark.job import Options, benchmark
from pipelines.data.layout import RESULTS
from pipelines.results.summary import read_results
from s2t_models.recipe import Recipe, load_recipe

POLICIES = ("greedy", "maj@8", "s2t", "s2t-local", "llm")


def job(recipe_path: Path, *overrides: str) -> Recipe:
    settings = ["benchmark.items=24", "benchmark.seeds=[0,1]", f"benchmark.policies=[{','.join(POLICIES)}]"]
    return load_recipe(recipe_path, [*settings, "collect.prompts=50", *overrides])


def run(recipe: Recipe, output: Path, stub: Stub) -> pd.DataFrame:
    store = f"sqlite:///{output.parent / 'mlflow.db'}"
    benchmark(recipe, output, Options(endpoint=stub.url, tracking=store))
    return read_results(output / RESULTS)[0]
