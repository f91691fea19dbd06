"""The whole loop on the embedded pair, in order: collect, distil, choose the budget, benchmark; minutes on two cores.

    s2t demo                             or: make demo
    s2t demo --output runs/again --items 1000

Each stage is the pipeline of its name, as a user would run it on a pair of their own. Stages whose results are there already are not run again. The output folder ends with `recipe.yaml` (the recipe with
its artifact, control and chosen budget, ready to serve) and `summary.json` (the figures of the table).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from s2t_models.recipe import Recipe, RecipeError, load_recipe

RECIPE = Path(__file__).resolve().parent.parent / "cluster" / "recipes" / "embedded.yaml"
BUDGETS = (0.01, 0.02, 0.05, 0.10, 0.20)
CALIBRATION_PROMPTS = 600
VALIDATION_ITEMS = 200
MEANING = """\
What it means: `s2t-local` is the SLM alone, choosing among its own candidates at the steps its trigger head picks; the budget
({budget:.0%} of steps) was chosen on validation problems, not on these. `takeover` and `s2t` ask the teacher at the same budget;
`llm` is the teacher writing everything. `kd` spends the same labels on plain distillation: the control an honest table shows.
The pair is tiny and was made for this task, so the table shows the method at work; it proves nothing about large models."""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    from pipelines.answers import AnswersError, EndpointError
    from pipelines.benchmark import BenchmarkError
    from pipelines.cluster import ClusterError
    from pipelines.collect import CollectError
    from pipelines.distil import DistilError
    from pipelines.questions import QuestionError
    from pipelines.shards import ShardError
    from s2t_models.artifact import ArtifactError

    try:
        demo(arguments.recipe, arguments.set, arguments.output, arguments.items)
    except (
        RecipeError,
        ShardError,
        ArtifactError,
        ClusterError,
        CollectError,
        DistilError,
        QuestionError,
        BenchmarkError,
        EndpointError,
        AnswersError,
    ) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def demo(recipe_path: Path, overrides: list[str], output: Path, items: int) -> dict[str, Any]:
    """Run what is missing of the loop in `output`; returns the summary. Raises the stages' own errors."""
    from pipelines import cluster

    began = time.monotonic()
    recipe = load_recipe(recipe_path, overrides)
    cluster.start()
    train, calibration = output / "train", output / "calibration"
    artifact, control = output / "artifact", output / "kd"
    _collect(recipe, train)
    _collect(_with(recipe, "collect", task="embedded-calibration", prompts=CALIBRATION_PROMPTS, sampled=0), calibration)
    _distil(recipe, train, calibration, artifact, control)
    recipe = recipe.model_copy(update={"artifact": str(artifact), "checkpoints": {"kd": str(control)}})
    recipe = recipe.model_copy(update={"budget": _choose_budget(recipe, output / "validation")})
    _write_recipe(recipe, output / "recipe.yaml")
    summary = _benchmark(_with(recipe, "benchmark", items=items), calibration, output)
    print(MEANING.format(budget=recipe.budget))
    print(
        f"\nfinished in {(time.monotonic() - began) / 60:.1f} minutes; the figures are in {output / 'summary.json'}\n"
        f"compare in MLflow   make mlflow   then open http://127.0.0.1:5000\n"
        f"serve it            .venv/bin/s2t serve --recipe {output / 'recipe.yaml'}"
    )
    return summary


def _collect(recipe: Recipe, folder: Path) -> None:
    from pipelines import collect
    from pipelines.publish import SUMMARY

    if (folder / SUMMARY).is_file():
        return
    _say(f"collect {recipe.collect.prompts} trajectories of {recipe.collect.task} into {folder}")
    print(collect.report(collect.collect(recipe, folder), folder))


def _distil(recipe: Recipe, train: Path, calibration: Path, artifact: Path, control: Path) -> None:
    from pipelines import distil

    if not artifact.is_dir():
        _say(f"distil the selector and the trigger head into {artifact}")
        print(distil.report(distil.distil(recipe, train, artifact, "selector", calibration), artifact))
    if not control.is_dir():
        _say(f"distil the kd control, the same labels, into {control}")
        print(distil.report(distil.distil(recipe, train, control, "kd"), control))


def _choose_budget(recipe: Recipe, folder: Path) -> float:
    """The smallest budget whose accuracy on validation problems is within one standard error of the best one's."""
    from pipelines.benchmark import RESULTS, Options, benchmark
    from pipelines.results import read_results, summarise

    policies = tuple(f"s2t-local@{budget:g}" for budget in BUDGETS)
    if not (folder / RESULTS).is_file():
        _say(f"choose the budget on {VALIDATION_ITEMS} validation problems")
        settings = {"task": ("embedded-validation",), "items": VALIDATION_ITEMS, "policies": policies}
        benchmark(_with(recipe, "benchmark", **settings), folder, Options())
    accuracy = {row.policy: row.accuracy for row in summarise(read_results(folder / RESULTS)[0])}
    best = max(accuracy.values())
    enough = best - math.sqrt(best * (1 - best) / VALIDATION_ITEMS)
    chosen = min(budget for budget in BUDGETS if accuracy[f"s2t-local@{budget:g}"] >= enough)
    print(
        "  ".join(f"{budget:.0%}: {accuracy[f's2t-local@{budget:g}']:.1%}" for budget in BUDGETS), f" -> {chosen:.0%}"
    )
    return chosen


def _benchmark(recipe: Recipe, calibration: Path, output: Path) -> dict[str, Any]:
    from pipelines.benchmark import RESULTS, Options, benchmark
    from pipelines.publish import SUMMARY
    from pipelines.results import demo_summary, read_results

    policies = ", ".join(recipe.benchmark.policies)
    _say(f"benchmark {policies} on {recipe.benchmark.items} test problems through the endpoint")
    tables = benchmark(recipe, output / "benchmark", Options())
    frame, metadata = read_results(output / "benchmark" / RESULTS)
    hits = {int(k): hit for k, hit in json.loads((calibration / SUMMARY).read_text())["hit"].items()}
    summary = demo_summary(frame, hits, recipe.budget, json.loads(metadata["s2t.splits"]))
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{tables}")
    return summary


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
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--items", type=int, default=500, help="test problems (500 or more for a firm answer)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
