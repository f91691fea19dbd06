"""Where the wrong answers of a benchmark first go wrong, asked of the teacher on the Ray cluster."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import ray

from pipelines.analyse.audit import TEACHER_ON_WRITTEN, Prompts, prompts_of, read, readable
from pipelines.analyse.kept import READ, is_kept, keep
from pipelines.data.layout import RESULTS
from pipelines.results.summary import read_results
from s2t_models.errors import UserError, one_line
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from s2t_models.threads import use_threads
from serving import cluster, placement


class ReadingError(UserError):
    """Answers that the teacher did not read; the message is one line."""


def read_wrong(folder: Location, recipe: Recipe, data: Path | None = None) -> int:
    """Let the teacher read the wrong answers in a benchmark's folder, unless it has; returns how many. What it said is
    in the folder's file READ, whose rows are those of the results. Only wrong answers of policies with a trigger are
    read, one forward each: an audit of all answers takes several times as long. Raises TaskError, ClusterError,
    ReadingError."""
    if is_kept(folder, READ):
        return int(read_results(folder / READ)[0][TEACHER_ON_WRITTEN].notna().sum())
    frame, metadata = read_results(folder / RESULTS)
    rows = readable(frame)
    views = pd.Series([None] * len(frame), index=frame.index, dtype=object)
    if len(rows):
        found = _on_the_cluster(rows, recipe, prompts_of(rows, recipe, data))
        views[rows.index] = pd.Series(found, index=rows.index, dtype=object)
    keep(folder, READ, frame.assign(**{TEACHER_ON_WRITTEN: views}), metadata)
    return len(rows)


def _on_the_cluster(rows: pd.DataFrame, recipe: Recipe, prompts: Prompts) -> list[list[float] | None]:
    """What `read` returns, as a task with the resources of a replica of the teacher."""
    teacher, what = recipe.teacher, f"{recipe.name}: reading {len(rows)} wrong answers"
    cluster.start()
    cluster.require(placement.actor_bundles(teacher, teacher.num_cpus, teacher.num_gpus), what)
    try:
        with placement.remote_options(teacher, teacher.num_cpus, teacher.num_gpus) as options:
            return ray.get(ray.remote(**options)(_read).remote(rows, recipe, prompts))
    except ray.exceptions.RayError as error:
        raise ReadingError(f"{what} failed: {one_line(error)}") from error


def _read(rows: pd.DataFrame, recipe: Recipe, prompts: Prompts) -> list[list[float] | None]:
    use_threads(recipe.teacher.num_cpus)
    return read(rows, recipe, prompts)
