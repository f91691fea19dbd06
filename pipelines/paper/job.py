"""Paper: run what is missing of a matrix, and write every table and figure of the paper from what is there.

    python -m pipelines.paper --recipe runs/demo/recipe.yaml --output runs/paper --items 200
    python -m pipelines.paper --recipe FILE --output DIR --tasks gsm8k,math500 --data DIR --only 1,A3
    python -m pipelines.paper --recipe FILE --output DIR --list

The job can be killed at any moment, and the same command goes on. A run that fails, or that this build or recipe cannot
give, costs the others nothing: what needs it says so where its figures would be. The output folder holds

    collections/ trainings/ benchmarks/     the runs, each as its own command writes it
    tables/ figures/                        CSV and Markdown; PNG and SVG
    paper.md                                all of it on one page, with what is left open and why
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.data.layout import COLLECTED, RECORD, SERVABLE_RECIPE
from pipelines.paper.evidence import Evidence
from pipelines.paper.matrix import load_matrix
from pipelines.paper.runs import Given, Run, Runs
from pipelines.paper.specs import Spec, chosen
from pipelines.paper.writing import PAGE, write
from pipelines.runtime import tracking
from pipelines.tasks import task
from s2t_models.errors import UserError, one_line
from s2t_models.locks import locked
from s2t_models.recipe import Recipe
from s2t_models.storage import Location, location, write_json


class PaperError(UserError):
    """A job that cannot begin; the message is one line."""


def collections_beside(recipe: str) -> dict[str, Location]:
    """The collections of a loop, where the recipe is the one that it wrote."""
    if location(recipe).name != SERVABLE_RECIPE:
        return {}
    found = {name: location(recipe).parent / name for name in ("train", "calibration")}
    return {name: place for name, place in found.items() if (place / COLLECTED).is_file()}


def given(
    recipe: Recipe,
    output: Location,
    matrix: Location | None = None,
    tasks: tuple[str, ...] = (),
    items: int | None = None,
    data: Path | None = None,
    tracking: str | None = None,
    collections: Mapping[str, Location] | None = None,
    unsandboxed: bool = False,
) -> Given:
    """What a job is given, with what the recipe says where nothing was said. Raises MatrixError, TaskError."""
    tasks = tasks or recipe.benchmark.task
    for name in tasks:
        task(name)
    return Given(
        recipe,
        load_matrix(matrix),
        output.resolve(),
        tasks,
        recipe.benchmark.items if items is None else items,
        data,
        tracking,
        dict(collections or {}),
        unsandboxed,
    )


def listing(job: Given, only: tuple[str, ...] = ()) -> str:
    """The runs, and what is done of them; then the tables and figures with the runs they read."""
    runs, specs = Runs(job), chosen(only)
    lines = []
    for run in _runs_of(runs, specs, only):
        reason = runs.never(run)
        state = "done" if runs.is_done(run) else f"left open: {reason}" if reason else "to do"
        lines.append(f"{run.name:32} {state}")
    tables = [f"{spec.name:32} {', '.join(spec.reads)}" for spec in specs]
    return "\n".join([*lines, "", *tables])


def paper(job: Given, only: tuple[str, ...] = (), runs_too: bool = True) -> int:
    """Run what is missing (`runs_too`), and write the tables and figures. Returns the status: 1 where a run failed.
    Raises UserError where nothing can begin."""
    specs = chosen(only)
    with locked(job.output):
        kept = f"what is in {job.output} is kept, and the same command logs the tables"
        tracking.use_store_for((job.output / RECORD).is_file(), kept, job.tracking)
        _claim(job)
        runs = Runs(job)
        wanted = _runs_of(runs, specs, only) if runs_too else []
        failed = [run.name for run in wanted if not _made(runs, run)]
        evidence = Evidence(runs)
        write(job, [(spec, spec.build(evidence, spec)) for spec in specs])
    print(f"\ntables and figures: {job.output / PAGE}")
    if failed:
        print(f"paper: {len(failed)} runs failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def _runs_of(runs: Runs, specs: tuple[Spec, ...], only: tuple[str, ...]) -> list[Run]:
    return runs.needed({part for spec in specs for part in spec.reads}) if only else runs.all()


def _made(runs: Runs, run: Run) -> bool:
    """Make the run unless it is there or cannot be had; returns whether it did not fail."""
    if runs.is_done(run):
        return True
    began = time.monotonic()
    try:
        if reason := runs.why_not(run):
            runs.open[run.name] = reason
            print(f"\n== {run.name}: left open: {reason}", flush=True)
            return True
        print(f"\n== {run.name}", flush=True)
        print(runs.make(run))
    except UserError as error:  # one run's fault costs the others nothing, and stands where its figures would be
        runs.open[run.name] = one_line(error)
        print(f"paper: {run.name}: {error}", file=sys.stderr)
        return False
    print(f"{run.name}: {time.monotonic() - began:.0f} s", flush=True)
    return True


def _claim(job: Given) -> None:
    """Note whose folder it is. Raises PaperError where it holds another recipe's."""
    path, mine = job.output / RECORD, job.recipe.digest()
    if not path.is_file():
        write_json(path, {"recipe": mine})
    if json.loads(path.read_text())["recipe"] != mine:
        raise PaperError(
            f"{job.output}: holds the runs of another recipe or of other settings; choose another --output"
        )
