"""The whole loop of a recipe, in order: collect, distil, choose the budget, benchmark, analyse.

    s2t loop --recipe qwen2.5-coder-0.5b-1.5b --output runs/real

Each stage is the pipeline of its name, as a user would run it. What is there already, made with the same settings, is
not made again, so a loop that was killed goes on where it was. The output folder ends with `recipe.yaml` (the recipe
with its artifact, control and chosen budget, ready to serve), `summary.json` (the figures of the table, and where wrong
answers first go wrong; of several tasks by their names, under `tasks`) and `stages.json` (the seconds each stage has
taken).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.data.layout import COLLECTED, RESULTS, SERVABLE_RECIPE, STAGES, SUMMARY
from pipelines.runtime.arguments import add_recipe, here, place
from s2t_models.commands import run_command
from s2t_models.errors import UserError, one_line
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.storage import Location


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        loop(load_recipe(options.recipe, options.set), options.output, here(options.data))

    return run_command("loop", work, options.output)


def loop(recipe: Recipe, output: Location, data: Path | None = None) -> Recipe:
    """Run what is missing of the loop in `output`; returns the recipe as it ends. Raises the stages' own errors
    (UserError)."""
    from serving import cluster

    began = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    cluster.start()
    output = output.resolve()  # the recipe names what comes of it, for processes that run in other folders
    train, calibration = output / "train", output / "calibration"
    artifact, control = output / "artifact", output / "kd"
    with _stage(output, "collect"):
        _collect(recipe.calibrating(), calibration, data)
        _collect(recipe.calibrated_by(calibration), train, data)
    with _stage(output, "distil selector"):
        _distil(recipe, train, artifact, "selector", calibration)
    with _stage(output, "distil kd"):
        _distil(recipe, train, control, "kd")
    recipe = recipe.model_copy(update={"artifact": str(artifact), "checkpoints": {"kd": str(control)}})
    if recipe.validation.task:
        with _stage(output, "choose the budget"):
            budget = _choose_budget(recipe, recipe.validation.task, output / "validation", data)
        recipe = recipe.model_copy(update={"budget": budget})
    servable = output / SERVABLE_RECIPE
    servable.write_text(f"# Written by `s2t loop`:  s2t serve --recipe {servable}\n{recipe.as_yaml()}")
    with _stage(output, "benchmark"):
        tables, seen = _benchmark(recipe, output / "benchmark", data)
    with _stage(output, "read wrong answers"):
        _read(recipe, output / "benchmark", data)
    _summarise(recipe, calibration, output, tables)
    _analyse(calibration, output)
    tools = os.path.relpath(Path(sys.executable).parent)
    print(
        f"\nfinished in {(time.monotonic() - began) / 60:.1f} minutes; the figures are in {output / SUMMARY}\n"
        f"serve it: {tools}/s2t serve --recipe {servable}\n"
        f"side by side in MLflow: {seen}"
    )
    return recipe


@contextmanager
def _stage(output: Location, name: str) -> Iterator[None]:
    """Add the time that the block takes to the stage's in `stages.json`, also where it is broken off."""
    began = time.monotonic()
    try:
        yield
    finally:
        path = output / STAGES
        seconds = json.loads(path.read_text()) if path.is_file() else {}
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - began, 1)
        path.write_text(json.dumps(seconds, indent=2) + "\n")


def _collect(recipe: Recipe, folder: Location, data: Path | None) -> None:
    from pipelines.collect import job as collect

    _say(f"collect {recipe.collect.prompts} trajectories of {recipe.collect.task} into {folder}")
    print(collect.report(collect.collect(recipe, folder, data=data), folder))


def _distil(
    recipe: Recipe, train: Location, output: Location, objective: str, calibration: Location | None = None
) -> None:
    from pipelines.distil import job as distil

    what = "the selector and the trigger head" if objective == "selector" else "the kd control, the same labels,"
    _say(f"distil {what} into {output}")
    print(distil.report(distil.distil(recipe, train, output, objective, calibration), output))


def _choose_budget(recipe: Recipe, task: str, folder: Location, data: Path | None) -> float:
    """The smallest budget whose accuracy on validation problems is within one standard error of the best one's."""
    from pipelines.benchmark.job import Options, benchmark, is_done
    from pipelines.results.summary import read_results, summarise

    budgets, items = recipe.validation.budgets, recipe.validation.items
    names = {budget: f"s2t-local@{budget:g}" for budget in budgets}
    _say(f"choose the budget on {items} problems of {task}")
    chosen = {"task": (task,), "items": items, "policies": tuple(names.values())}
    job = recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update=chosen)})
    if not is_done(job, folder):
        benchmark(job, folder, Options(data=data))
    by_name = {row.policy: row.accuracy for row in summarise(read_results(folder / RESULTS)[0])}
    accuracy = {budget: by_name[name] for budget, name in names.items()}
    best = max(accuracy.values())
    enough = best - math.sqrt(best * (1 - best) / items)
    smallest = min(budget for budget in budgets if accuracy[budget] >= enough)
    print("  ".join(f"{budget:.0%}: {value:.1%}" for budget, value in accuracy.items()), f" -> {smallest:.0%}")
    return smallest


def _benchmark(recipe: Recipe, folder: Location, data: Path | None) -> tuple[str, str]:
    """Returns the tables, and where MLflow shows the runs."""
    from pipelines.benchmark.job import Options, benchmark

    policies, tasks = ", ".join(recipe.benchmark.policies), ", ".join(recipe.benchmark.task)
    _say(f"benchmark {policies} on {recipe.benchmark.items or 'all'} problems of {tasks} through the endpoint")
    return benchmark(recipe, folder, Options(data=data))


def _read(recipe: Recipe, folder: Location, data: Path | None) -> None:
    """Let the teacher read the wrong answers. Where it cannot, the loop has its figures all the same."""
    from pipelines.analyse.reading import read_wrong

    _say("read the wrong answers of the policies with a trigger with the teacher, for where they first go wrong")
    try:
        print(f"{read_wrong(folder, recipe, data)} read")
    except UserError as error:
        print(
            f"loop: {one_line(error)}; the other figures are whole, and the same command tries again", file=sys.stderr
        )


def _summarise(recipe: Recipe, calibration: Location, output: Location, tables: str) -> None:
    """Write the summary, and print it with the tables of the benchmark."""
    from pipelines.analyse.errors import first_wrong_rows
    from pipelines.results.summary import SUMMARY_NAMES, loop_summary, markdown_table, read_results

    frame, metadata = read_results(_answers(output / "benchmark"))
    hits = {int(k): hit for k, hit in json.loads((calibration / COLLECTED).read_text())["hit"].items()}
    splits = json.loads(metadata["s2t.splits"])
    summaries = {
        task: loop_summary(rows, hits, recipe.budget, splits) for task, rows in frame.groupby("task", sort=False)
    }
    wrong = first_wrong_rows(frame)
    for row in wrong:
        places = {key: value for key, value in row.items() if key not in ("task", "policy")}
        name = SUMMARY_NAMES.get(row["policy"], row["policy"])
        summaries[row["task"]].setdefault("first_wrong", {})[name] = places
    whole = {"tasks": summaries} if len(summaries) > 1 else next(iter(summaries.values()))
    (output / SUMMARY).write_text(json.dumps(whole, indent=2) + "\n")
    against = "\n".join(_against(task, summary) for task, summary in summaries.items())
    print(f"\n{tables}\n{against}\n")
    if wrong:
        header = [key.replace("_", " ") for key in wrong[0]]
        table = markdown_table(header, [[str(value) for value in row.values()] for row in wrong])
        print(f"where wrong answers first go wrong:\n{table}\n")


def _answers(folder: Location) -> Location:
    """The results of a benchmark, with what the teacher said of its wrong answers where it has read them."""
    from pipelines.analyse.kept import READ, is_kept

    return folder / (READ if is_kept(folder, READ) else RESULTS)


def _against(task: str, summary: dict[str, Any]) -> str:
    """S2T-Local's paired differences from every other policy on a task, in points."""
    pairs = []
    for name in summary["policies"]:
        if pair := summary["paired"].get(f"s2t-local-{name}"):
            low, high = (100 * end for end in pair["interval"])
            pairs.append(f"  {name:<16} {100 * pair['difference']:+6.1f}  [{low:+.1f}, {high:+.1f}]")
    return "\n".join([f"s2t-local against, in points on the same problems of {task}:", *pairs])


def _analyse(calibration: Location, output: Location) -> None:
    from pipelines.analyse.job import analyse

    _say(f"analyse: Hit@K, accuracy against budget and the error split, as tables and figures in {output / 'analysis'}")
    results = [_answers(output / "benchmark"), output / "validation" / RESULTS]
    analyse([calibration, *(path for path in results if path.is_file())], output / "analysis")


def _say(what: str) -> None:
    print(f"\n== {what}", flush=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t loop", description="Collect, distil, benchmark and analyse one recipe.")
    add_recipe(parser)
    parser.add_argument(
        "--output", type=place, required=True, help="folder of all stages: a path that all nodes share, or a URI"
    )
    parser.add_argument("--data", type=place, help="folder of benchmark data, for tasks that read files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
