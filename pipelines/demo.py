"""The whole loop on the embedded pair, in order: collect, distil, choose the budget, benchmark; minutes on two cores.

    s2t demo                             or: make demo
    s2t demo --output runs/again --items 1000

Each stage is the pipeline of its name, as a user would run it on a pair of their own. What is there already, made with
the same settings, is not made again. The output folder ends with `recipe.yaml` (the recipe with its artifact, control
and chosen budget, ready to serve) and `summary.json` (the figures of the table).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipelines.data.layout import COLLECTED, DEMO_SUMMARY, RESULTS, SERVABLE_RECIPE
from s2t_models.commands import run_command
from s2t_models.recipe import Recipe, load_recipe

RECIPE = "embedded"
BUDGETS = (0.01, 0.02, 0.05, 0.10)
CALIBRATION_PROMPTS = 400
VALIDATION_ITEMS = 200
MEANING = """\
What it means: `s2t-local` is the SLM alone, choosing among its own candidates at the steps its trigger head picks.
The budget ({budget:.0%} of steps) was chosen on validation problems, not on these. `takeover` and `s2t` ask the teacher
at the same budget; `llm` is the teacher writing everything. `kd` spends the same labels on plain distillation: the
control that an honest table shows. `s2t-local-w0` is the same artifact choosing by its scores alone, without the SLM's
ranking that it was trained beside. The pair is tiny and was made for this task: the table shows the method at work, and
proves nothing about large models."""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        demo(options.recipe, options.set, options.output, options.items)

    return run_command("demo", work, options.output)


def demo(recipe_path: str | Path, overrides: list[str], output: Path, items: int) -> dict[str, Any]:
    """Run what is missing of the loop in `output`; returns the summary. Raises the stages' own errors (UserError)."""
    from serving import cluster

    began = time.monotonic()
    recipe = load_recipe(recipe_path, overrides)
    cluster.start()
    train, calibration = output / "train", output / "calibration"
    artifact, control = output / "artifact", output / "kd"
    _collect(recipe, train)
    _collect(_with(recipe, "collect", task="embedded-calibration", prompts=CALIBRATION_PROMPTS, sampled=0), calibration)
    _distil(recipe, train, artifact, "selector", calibration)
    _distil(recipe, train, control, "kd")
    recipe = recipe.model_copy(update={"artifact": str(artifact), "checkpoints": {"kd": str(control)}})
    recipe = recipe.model_copy(update={"budget": _choose_budget(recipe, output / "validation")})
    _write_recipe(recipe, output / SERVABLE_RECIPE)
    summary = _compare(_with(recipe, "benchmark", items=items), calibration, output)
    _analyse(calibration, output)
    print(MEANING.format(budget=recipe.budget))
    tools = os.path.relpath(Path(sys.executable).parent)
    print(
        f"\nfinished in {(time.monotonic() - began) / 60:.1f} minutes; the figures are in {output / 'summary.json'}\n"
        f"compare in MLflow   {tools}/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db   opens http://127.0.0.1:5000\n"
        f"serve it            {tools}/s2t serve --recipe {output / 'recipe.yaml'}"
    )
    return summary


def _collect(recipe: Recipe, folder: Path) -> None:
    from pipelines.collect import job as collect

    _say(f"collect {recipe.collect.prompts} trajectories of {recipe.collect.task} into {folder}")
    print(collect.report(collect.collect(recipe, folder), folder))


def _distil(recipe: Recipe, train: Path, output: Path, objective: str, calibration: Path | None = None) -> None:
    from pipelines.distil import job as distil

    what = "the selector and the trigger head" if objective == "selector" else "the kd control, the same labels,"
    _say(f"distil {what} into {output}")
    print(distil.report(distil.distil(recipe, train, output, objective, calibration), output))


def _choose_budget(recipe: Recipe, folder: Path) -> float:
    """The smallest budget whose accuracy on validation problems is within one standard error of the best one's."""
    from pipelines.benchmark.job import Options, benchmark
    from pipelines.results.summary import read_results, summarise

    policies = tuple(f"s2t-local@{budget:g}" for budget in BUDGETS)
    _say(f"choose the budget on {VALIDATION_ITEMS} validation problems")
    settings = {"task": ("embedded-validation",), "items": VALIDATION_ITEMS, "policies": policies}
    job = _with(recipe, "benchmark", **settings)
    if not _is_done(job, folder / RESULTS):
        benchmark(job, folder, Options())
    accuracy = {row.policy: row.accuracy for row in summarise(read_results(folder / RESULTS)[0])}
    best = max(accuracy.values())
    enough = best - math.sqrt(best * (1 - best) / VALIDATION_ITEMS)
    chosen = min(budget for budget in BUDGETS if accuracy[f"s2t-local@{budget:g}"] >= enough)
    print(
        "  ".join(f"{budget:.0%}: {accuracy[f's2t-local@{budget:g}']:.1%}" for budget in BUDGETS), f" -> {chosen:.0%}"
    )
    return chosen


def _compare(recipe: Recipe, calibration: Path, output: Path) -> dict[str, Any]:
    from pipelines.benchmark.job import Options, benchmark
    from pipelines.results.summary import demo_summary, read_results

    policies = ", ".join(recipe.benchmark.policies)
    _say(f"benchmark {policies} on {recipe.benchmark.items} test problems through the endpoint")
    folder = output / "benchmark"
    tables = benchmark(recipe, folder, Options())
    frame, metadata = read_results(folder / RESULTS)
    hits = {int(k): hit for k, hit in json.loads((calibration / COLLECTED).read_text())["hit"].items()}
    summary = demo_summary(frame, hits, recipe.budget, json.loads(metadata["s2t.splits"]))
    (output / DEMO_SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{tables}\n{_against(summary)}\n")
    return summary


def _against(summary: dict[str, Any]) -> str:
    """S2T-Local's paired differences from every other policy, in points."""
    pairs = []
    for name in summary["policies"]:
        if pair := summary["paired"].get(f"s2t-local-{name}"):
            low, high = (100 * end for end in pair["interval"])
            pairs.append(f"  {name:<16} {100 * pair['difference']:+6.1f}  [{low:+.1f}, {high:+.1f}]")
    return "\n".join(["s2t-local against, in points on the same problems:", *pairs])


def _analyse(calibration: Path, output: Path) -> None:
    from pipelines.analyse.job import analyse

    _say(f"analyse: Hit@K, accuracy against budget and the error split, as tables and figures in {output / 'analysis'}")
    results = [output / stage / RESULTS for stage in ("benchmark", "validation")]
    analyse([calibration, *results], output / "analysis")


def _is_done(recipe: Recipe, results: Path) -> bool:
    """Whether the results are whole, of this job and of this artifact."""
    from pipelines.results.summary import read_results
    from s2t_models import loading
    from s2t_models.artifact import Artifact

    if not results.is_file():
        return False
    frame, metadata = read_results(results)
    weights = loading.weights_hash(Artifact.load(str(recipe.artifact)).model(recipe.slm))
    is_whole = not (frame["verdict"] == "errored").any()
    return is_whole and metadata["s2t.recipe"] == recipe.model_dump_json() and weights in frame["models"].iloc[0]


def _write_recipe(recipe: Recipe, path: Path) -> None:
    import yaml

    path.write_text(
        f"# Written by `s2t demo`:  s2t serve --recipe {path}\n"
        + yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    )


def _with(recipe: Recipe, section: str, **settings: Any) -> Recipe:
    changed = type(getattr(recipe, section)).model_validate(getattr(recipe, section).model_dump() | settings)
    return recipe.model_copy(update={section: changed})


def _say(what: str) -> None:
    print(f"\n== {what}", flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t demo", description="The whole loop on the embedded pair.")
    parser.add_argument("--recipe", default=RECIPE, help="a YAML file, or a shipped name")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--items", type=int, default=500, help="test problems (500 or more for a firm answer)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
