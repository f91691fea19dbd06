"""What a results file says, for people: tables, figures and the MLflow runs of a job, all from the file
alone.

The parent run is the job: recipe, tables of results and flips, figures. Under it is a child run a (policy,
task), whose metrics answer "which policy, at what cost" in MLflow's comparison view.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from pipelines.data.layout import FIGURES, TABLES
from pipelines.results import figures
from pipelines.results.averages import MathsAverage, maths_averages, maths_table
from pipelines.results.figures import Point
from pipelines.results.summary import Summary, as_rows, comparisons, markdown, read_results, summarise
from pipelines.runtime import tracking as store
from s2t_models.recipe import Recipe
from s2t_models.storage import Location, written_to
from serving.registry import Version, registered
from serving.store import use_store

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset


def report(results: Location, output: Location, tracking: str | None) -> tuple[str, str]:
    """Write tables.md, CSV files and figures to `output`, log all of it to the MLflow store `tracking`, and
    return the tables, and where MLflow shows the policies side by side ("not logged" where the store fails). Raises
    ResultsError."""
    frame, metadata = read_results(results)
    recipe = Recipe.model_validate_json(metadata["s2t.recipe"])
    summaries = summarise(frame, metadata)
    pairs, flips = comparisons(frame)
    averages = maths_averages(summaries)
    tables = markdown(summaries, pairs) + maths_table(averages)
    figures = draw(summaries, pairs)
    with written_to(output) as folder:
        (folder / TABLES).write_text(tables)
        pd.DataFrame(as_rows(summaries)).to_csv(folder / "policies.csv", index=False)
        pd.DataFrame(pairs).to_csv(folder / "comparisons.csv", index=False)
        flips.to_csv(folder / "flips.csv", index=False)
        (folder / FIGURES).mkdir(exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(folder / FIGURES / name)
    seen = "not logged"
    with store.costs_nothing(f"{results} is whole, and the same command logs it"):
        seen = _track(tracking, frame, metadata, recipe, summaries, averages, pairs, flips, tables, figures, results)
    return tables, seen


def draw(summaries: Sequence[Summary], pairs: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures of a job by file name, those of each task: accuracy, against cost, over budget and K,
    flips."""
    drawn = {}
    for task in dict.fromkeys(summary.task for summary in summaries):
        own = [summary for summary in summaries if summary.task == task]
        items = f"{task}, {own[0].items} items"
        drawn[f"{task}-accuracy.png"] = figures.accuracy([_point(summary) for summary in own], items)
        drawn[f"{task}-accuracy-seconds.png"] = figures.accuracy_against_cost(
            [_point(summary, summary.seconds) for summary in own], "seconds an answer, under the job's load", items
        )
        drawn[f"{task}-accuracy-teacher-tokens.png"] = figures.accuracy_against_cost(
            [_point(summary, summary.teacher_prefill + summary.teacher_decode) for summary in own],
            "teacher tokens an answer, read and written",
            items,
        )
        first = own[0].policy
        against = [pair for pair in pairs if pair["task"] == task and pair["b"] == first]
        if against:
            drawn[f"{task}-flips.png"] = figures.flips(
                [(f"{pair['a']} against {first}", pair["gained"], pair["lost"]) for pair in against], items
            )
        for axis, label in (("budget", "budget tau, % of the steps"), ("k", "candidates K")):
            series = _sweep(own, axis)
            if series:
                drawn[f"{task}-accuracy-{axis}.png"] = figures.accuracy_over(
                    series, label, items, percent=axis == "budget"
                )
    return drawn


def _point(summary: Summary, x: float = 0.0, label: str | None = None) -> Any:
    return Point(label or summary.policy, summary.accuracy, summary.low, summary.high, x)


def _sweep(summaries: Sequence[Summary], axis: str) -> dict[str, list[Any]]:
    """Lines of triggered policies that were run at several values of `axis` ("budget" or "k"), the other one
    held."""
    lines: dict[str, list[Any]] = {}
    for summary in summaries:
        x, held = getattr(summary, axis), summary.k if axis == "budget" else summary.budget
        if x is not None:
            label = "" if held is None else f", K = {held}" if axis == "budget" else f", tau = {100 * held:g}%"
            lines.setdefault(summary.kind + label, []).append(_point(summary, float(x)))
    return {label: points for label, points in lines.items() if len({point.x for point in points}) > 1}


def _track(
    tracking: str | None,
    frame: pd.DataFrame,
    metadata: Mapping[str, str],
    recipe: Recipe,
    summaries: Sequence[Summary],
    averages: Sequence[MathsAverage],
    pairs: Sequence[Mapping[str, Any]],
    flips: pd.DataFrame,
    tables: str,
    figures: Mapping[str, Figure],
    results: Location,
) -> str:
    use_store(tracking)
    splits = json.loads(metadata.get("s2t.splits", "{}"))
    datasets = {
        task: store.dataset(task, splits[name])
        for task in dict.fromkeys(frame["task"])
        if (name := f"test ({task})") in splits
    }
    versions = registered(dict.fromkeys(digest for models in frame["models"].unique() for digest in _weights(models)))
    job = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest(),
        "budget": recipe.budget,
        "k": recipe.candidates.k,
        "tasks": ",".join(dict.fromkeys(frame["task"])),
        "policies": ",".join(dict.fromkeys(frame["policy"])),
        "seeds": ",".join(str(seed) for seed in sorted(frame["seed"].unique())),
    }
    with store.start_run(f"benchmark {recipe.name}", job, {"s2t.stage": "benchmark"}):
        store.log_text(json.dumps(recipe.model_dump(mode="json"), indent=2), "recipe.json")
        store.log_text(metadata.get("s2t.splits", "{}"), "splits.json")
        store.log_text(tables, TABLES)
        store.log_table(as_rows(summaries), "tables/policies.json")
        store.log_table(pairs, "tables/comparisons.json")
        store.log_table(flips.to_dict("records"), "tables/flips.json")
        store.log_file(results)
        for name, figure in figures.items():
            store.log_figure(figure, f"{FIGURES}/{name}")
        for rows in datasets.values():
            store.log_dataset(rows, "test")
        runs = [
            _track_policy(frame, recipe, summary, pairs, datasets.get(summary.task), versions) for summary in summaries
        ]
        for average in averages:
            params = {"policy": average.policy, "task": "maths average", "recipe": recipe.name}
            with store.start_run(f"{average.policy}, maths average", params, {"s2t.stage": "average"}):
                metrics = {"maths_average": average.accuracy, "relative_gain": average.gain}
                store.log_metrics(metrics | {"accuracy_low": average.low, "accuracy_high": average.high})
    return store.link(runs)


def _weights(models: str | None) -> list[str]:
    """The sha256 of the weights that an answer's `models` names."""
    return list(json.loads(models or "{}").values())


def _track_policy(
    frame: pd.DataFrame,
    recipe: Recipe,
    summary: Summary,
    pairs: Sequence[Mapping[str, Any]],
    dataset: Dataset | None,
    versions: Mapping[str, Version],
) -> str:
    """A run of the policy, whose inputs are the task's rows and the registered models that answered; returns its id."""
    rows = frame[(frame["task"] == summary.task) & (frame["policy"] == summary.policy)]
    params = {"policy": summary.policy, "task": summary.task, "recipe": recipe.name, "items": summary.items}
    params |= {name: value for name in ("budget", "k") if (value := getattr(summary, name)) is not None}
    metrics = {
        "accuracy": summary.accuracy,
        "accuracy_low": summary.low,
        "accuracy_high": summary.high,
        "accuracy_deviation": summary.deviation,
        "score": summary.score,
        "correct": summary.correct,
        "wrong": summary.wrong,
        "truncated": summary.truncated,
        "errored": summary.errored,
        "shortened": summary.shortened,
        "tokens": summary.tokens,
        "teacher_tokens": summary.teacher_prefill + summary.teacher_decode,
        "teacher_prefill": summary.teacher_prefill,
        "teacher_decode": summary.teacher_decode,
        "training_teacher_read": summary.training_read,
        "training_teacher_written": summary.training_written,
        "forwards": summary.forwards,
        "decisions": summary.decisions,
        "seconds": summary.seconds,
    }
    for pair in pairs:
        if pair["task"] == summary.task and pair["a"] == summary.policy and pair["b"] == frame["policy"].iloc[0]:
            metrics |= {f"difference{end}": pair[f"{name}"] for end, name in _DIFFERENCE.items()}
    answered = dict.fromkeys(digest for models in rows["models"].unique() for digest in _weights(models))
    used = [versions[digest] for digest in answered if digest in versions]
    tags = {"s2t.stage": "policy"}
    if used:
        tags["s2t.models"] = ", ".join(version.uri for version in used)
    with store.start_run(f"{summary.policy} on {summary.task}", params, tags) as run:
        if dataset:
            store.log_dataset(dataset, "test")
        for version in used:
            store.log_model_input(version.model_id)
        store.log_metrics(metrics, model_id=used[0].model_id if used else None, rows=dataset)
        columns = ["item", "seed", "repeat", "verdict", "extracted", "answer", "tokens", "seconds", "error", "output"]
        store.log_table(rows[columns].to_dict("records"), "tables/results.json")
    return run


#: Suffix of the metric -> column of the comparison with the task's first policy.
_DIFFERENCE = {"": "difference", "_low": "low", "_high": "high", "_p": "p"}
