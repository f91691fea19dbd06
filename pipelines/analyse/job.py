"""Analyse: the paper's curves, tables and figures that shards or results can give, as CSV and PNG files and
in MLflow.

    python -m pipelines.analyse runs/train --output runs/analysis
    python -m pipelines.analyse runs/benchmark/results.parquet runs/k4/results.parquet --output runs/analysis
    python -m pipelines.analyse runs/benchmark/results.parquet --audit --output runs/analysis

A folder is a collection of shards, a .parquet file a benchmark's results; several results files (of other
budgets, other K) make curves. `--audit` asks the recipe's teacher about the choices of s2t-local, and about the tokens
of all answers that a trigger had a part in: one forward an answer, here in this process. Results that hold greedy
decoding beside S2T also make pages of single answers (`pages`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from matplotlib.figure import Figure

from pipelines.analyse import PAGES
from pipelines.analyse import decisions as decision_analysis
from pipelines.analyse import shard_tables as shard_analysis
from pipelines.analyse.audit import audit, prompts_of
from pipelines.analyse.decisions import Results
from pipelines.analyse.errors import Place
from pipelines.analyse.pages import INDEX, write_pages
from pipelines.data.layout import RESULTS
from pipelines.data.shards import read_shards
from pipelines.results.summary import markdown_table, read_results
from pipelines.runtime import tracking as store
from s2t_models.errors import NothingDone, UserError, one_line
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.storage import Location, remove, written_to
from serving.store import use_store


class AnalysisError(UserError):
    """Input that cannot be analysed; the message is one line."""


_PAGES_FOLDER = "pages"


def analyse(
    inputs: list[Location],
    output: Location,
    tracking: str | None = None,
    audited: bool = False,
    data: Path | None = None,
    most_pages: int = PAGES,
) -> str:
    """Write the tables (CSV), figures (PNG) and pages (HTML) of `inputs` to `output`, log them to MLflow, and return
    the tables as Markdown, and where the pages are.

    Raises UserError: the inputs are none, cannot be read, every row of one errored, or what an audit needs is missing.
    """
    use_store(tracking)
    tables: dict[str, list[dict[str, Any]]] = {}
    pages = ""
    figures: dict[str, Figure] = {}
    collections, files = _sort(inputs)
    if collections:
        table, metadata = read_shards(collections[0])
        tables |= shard_analysis.tables(table, metadata)
        figures |= shard_analysis.figures(table, metadata, tables)
    if files:
        results: Results = [_answered(path) for path in files]
        if audited:
            results = [(_audited(frame, metadata, data), metadata) for frame, metadata in results]
        tables |= decision_analysis.tables(results)
        figures |= decision_analysis.figures(results, tables)
        pages = _pages(results, output / _PAGES_FOLDER, most_pages, data)
    _write(output, tables, figures)
    with store.costs_nothing(f"{output} is whole, and the same command logs it"):
        _track(inputs, output, tables, figures, tracking)
    parts = [f"### {name.replace('_', ' ')}\n\n{_markdown(rows)}" for name, rows in tables.items() if rows]
    return "\n\n".join([*parts, *([pages] if pages else [])])


def _sort(inputs: list[Location]) -> tuple[list[Location], list[Location]]:
    """(collections of shards, results files). Raises AnalysisError for what is neither, or for two
    collections."""
    collections: list[Location] = []
    files: list[Location] = []
    for path in inputs:
        if path.is_dir() and (path / RESULTS).is_file():
            files.append(path / RESULTS)
        elif path.is_dir():
            collections.append(path)
        elif path.is_file():
            files.append(path)
        else:
            raise AnalysisError(f"{path}: no such collection of shards or results file")
    if len(collections) > 1:
        raise AnalysisError(f"{collections[1]}: one collection of shards at a time; analyse it by itself")
    return collections, files


def _answered(path: Location) -> tuple[pd.DataFrame, dict[str, str]]:
    """A results file with an answer in it. Raises NothingDone where every row errored."""
    frame, metadata = read_results(path)
    errored = frame[frame["verdict"] == "errored"]
    if len(errored) and len(errored) == len(frame):
        raise NothingDone(
            f"{path}: all {len(frame)} rows errored (the first: {one_line(errored['error'].iloc[0] or 'no reason')})"
        )
    return frame, metadata


def _audited(frame: Any, metadata: Mapping[str, str], data: Path | None) -> Any:
    recipe = Recipe.model_validate_json(metadata["s2t.recipe"])
    return audit(frame, recipe, prompts_of(frame, recipe, data))


def _pages(results: Results, folder: Location, most: int, data: Path | None) -> str:
    """Write the pages of single answers; in a line, where they are, "" where there are none."""
    remove(folder)  # those of other results
    try:
        made = write_pages(results, folder, most, data)
    except RecipeError as error:
        return f"no pages of single answers: {one_line(error)}"
    if not any(made.values()):
        return ""
    numbers = " and ".join(f"{number} {turned}" for turned, number in made.items())
    return f"pages of {numbers} answers: {folder / INDEX}"


def _write(output: Location, tables: dict[str, list[dict[str, Any]]], figures: dict[str, Figure]) -> None:
    with written_to(output) as folder:
        for name, rows in tables.items():
            if rows:
                pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
        for name, figure in figures.items():
            figure.savefig(folder / name)


def _track(
    inputs: list[Location],
    output: Location,
    tables: dict[str, list[dict[str, Any]]],
    figures: dict[str, Figure],
    tracking: str | None,
) -> None:
    use_store(tracking)
    names = " ".join(path.name if path.is_dir() else path.parent.name for path in inputs)
    with store.start_run(
        f"analyse {names}", {"inputs": json.dumps([str(i) for i in inputs])}, {"s2t.stage": "analyse"}
    ):
        for name, rows in tables.items():
            store.log_table(rows, f"tables/{name}.json")
        for name, figure in figures.items():
            store.log_figure(figure, f"figures/{name}")
        if (output / _PAGES_FOLDER).is_dir():
            store.log_folder(output / _PAGES_FOLDER, _PAGES_FOLDER)
        for row in tables.get("hit", ()):
            if row["k"] in (1, 2, 4, 8):
                store.log_metrics({f"hit_{row['k']}_at_{100 * row['tau']:g}pct": row["hit"]})
        for row in tables.get("first_wrong", ()):
            policy = row["policy"].replace("@", " at ")  # which no metric's name may hold
            places = {place: row[place] for place in get_args(Place)}
            store.log_metrics({f"first_wrong_{place}/{row['task']}/{policy}": n for place, n in places.items()})


def _markdown(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    return markdown_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
