"""The labels: pools of the same prompts, made once, and of them the collection that a point is trained on.

In one pool the SLM wrote and the teacher read, in another the teacher wrote, and in the third S2T did, with the teacher
choosing at a tenth of the steps. A pool keeps the candidates of every step. Which steps are worth training on is
decided for each collection by itself, as `s2t collect` would if it had been asked for so many prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks.label_efficiency.plan import SYSTEMS, Experiment, Point
from pipelines.collect import prompts as sources
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.publish import publish
from pipelines.collect.rescued import RescuedRollouts, rescuing
from pipelines.collect.schemas import LABELLED, PROMPT
from pipelines.data.layout import COLLECTED
from pipelines.data.seal import read_sealed, sealed
from pipelines.data.shards import shard_metadata
from s2t_models import loading
from s2t_models.engines.load import load
from s2t_models.hosting import collecting, pair
from s2t_models.recipe import Recipe
from s2t_models.settings import Writer
from s2t_models.storage import whole

#: Rows that are made, and kept, at once.
BATCH = 128


def writers(experiment: Experiment, points: Sequence[Point]) -> list[Writer]:
    """Who writes the pools that these points take: the SLM's says what is of equal cost."""
    return ["slm", *sorted({_writer(experiment, point) for point in points} - {"slm"})]


def missing(experiment: Experiment, writer: Writer) -> list[int]:
    """Where the batches of prompts begin that are not in the pool yet."""
    starts = range(0, experiment.recipe.collect.prompts, BATCH)
    return [start for start in starts if not _file(_folder(experiment, writer), start).is_file()]


def make_pool(experiment: Experiment, writer: Writer) -> None:
    """Roll out and label the prompts of the pool that are not there yet."""
    recipe, folder = _collecting(experiment.recipe, writer), _folder(experiment, writer)
    rows = sources.rows(sources.from_task(recipe.collect.task, None, recipe), recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        make = _rescuing(experiment, recipe, running) if writer == "s2t" else _labelling(recipe, running)
        for start in missing(experiment, writer):
            _write(_file(folder, start), make(pa.Table.from_pylist(rows[start : start + BATCH], PROMPT)))


def _labelling(recipe: Recipe, running: ExitStack) -> Callable[[pa.Table], pa.Table]:
    engines, collect = pair(recipe), recipe.collect
    rollouts, labels = Rollouts(recipe, engines[collect.drafter]), Labels(recipe, engines[collect.reader])
    for actor in (rollouts, labels):
        running.callback(actor.engine.close)
    return lambda prompts: labels(rollouts(prompts))


def _rescuing(experiment: Experiment, recipe: Recipe, running: ExitStack) -> Callable[[pa.Table], pa.Table]:
    hosting = collecting(recipe.changed({"trigger.threshold": rescue_threshold(experiment)}))
    teacher = load(hosting.engines["teacher"])
    rollouts = RescuedRollouts(recipe, hosting.engines["slm"], rescuing(hosting), [teacher])
    for engine in (rollouts.engine, teacher):
        running.callback(engine.close)
    return rollouts


def rescue_threshold(experiment: Experiment) -> float:
    """The KL in nats that a share of the recipe's budget of the steps in the SLM's own pool reach."""
    kl = pc.list_flatten(_pool(experiment, "slm")["kl_T"]).to_numpy()
    return float(np.quantile(kl, 1 - experiment.recipe.budget))


def _writer(experiment: Experiment, point: Point) -> Writer:
    return "s2t" if SYSTEMS[point.system].rescued else experiment.objective(point).drafter


def collection(experiment: Experiment, point: Point) -> Path:
    """The folder of the point's collection, which is made where it is missing. Points of one seed have prefixes of one
    permutation of the prompts. What the teacher or S2T wrote is cut where it has cost as many of the teacher's tokens
    as the labels of `prompts` prompts that the SLM wrote to."""
    output = experiment.place(point) / "labels"
    if (output / COLLECTED).is_file():
        return output
    writer = _writer(experiment, point)
    order = np.random.default_rng(point.seed).permutation(experiment.recipe.collect.prompts)
    rows = _pool(experiment, "slm").take(order[: point.prompts])
    if writer != "slm":
        written = _pool(experiment, writer).take(order)
        costs, enough = _cost(written, writer).cumsum(), _cost(rows, "slm").sum()
        rows = written.slice(0, int(np.searchsorted(costs, enough, side="right")))
    rows = rows.set_column(0, PROMPT.field("index"), pa.array(np.arange(len(rows))))
    recipe = _collecting(experiment.recipe, writer)
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    metadata = shard_metadata(recipe, slm, teacher, loading.tokenizer_hash(recipe.slm), recipe.collect.task)
    output.mkdir(parents=True, exist_ok=True)
    _write(labelled := output / "labelled.arrow", rows)
    publish([labelled], len(rows), output, metadata, recipe)
    labelled.unlink()
    return output


def _collecting(recipe: Recipe, writer: Writer) -> Recipe:
    return recipe.by_teacher() if writer == "teacher" else recipe.changed({"collect.writer": writer})


def _folder(experiment: Experiment, writer: Writer) -> Path:
    return experiment.folder / "labels" / writer


def _file(folder: Path, start: int) -> Path:
    return folder / f"{start:06}.arrow"


def _write(path: Path, rows: pa.Table) -> None:
    with whole(path) as part:
        part.write_bytes(sealed(rows.select(LABELLED.names).cast(LABELLED)))


def _pool(experiment: Experiment, writer: Writer) -> pa.Table:
    return pa.concat_tables(read_sealed(path) for path in sorted(_folder(experiment, writer).glob("*.arrow")))


def _cost(rows: pa.Table, writer: Writer) -> np.ndarray:
    """What each row asked of the teacher, in tokens read and written."""
    read = pc.fill_null(rows["teacher_read"], 0).to_numpy()
    if writer != "teacher":
        return read
    return read + pc.fill_null(pc.list_value_length(rows["output_ids"]), 0).to_numpy()
