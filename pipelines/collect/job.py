"""Collect: prompts -> SLM rollouts -> teacher labels -> Arrow shards, on Ray Data (section 4.3, D.2).

    python -m pipelines.collect --recipe cluster/recipes/embedded.yaml --output runs/train
    python -m pipelines.collect --recipe cluster/recipes/embedded.yaml --output runs/calibration \\
        --task embedded-calibration --set collect.sampled=0 --set collect.prompts=600

Rollout actors hold an SLM engine, labelling actors a teacher engine; both are pools sized by the recipe. With
`collect.writer` = teacher (`--teacher`) it is the teacher that writes and the SLM that reads; with s2t the rollout
actors ask the teacher as they write. The job can be killed at any moment: the same command goes on where it stopped and
ends with the same shards. `work` in the output folder holds what a running collection needs and is gone at the end; the
output is on a file system that all nodes share, or in an object store.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from pipelines.collect import prompts as sources
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.publish import FailedRows, publish
from pipelines.collect.rescued import RescuedRollouts, deciding, rescuing
from pipelines.collect.runs import log_collection
from pipelines.collect.schemas import LABELLED, PROMPT
from pipelines.data.layout import COLLECTED, RECORD
from pipelines.data.shards import shard_metadata
from pipelines.data.sink import (
    OWN_TASKS,
    ArrowSink,
    CommittedRows,
    committed,
    on_record,
    rows_left,
    take_back,
    with_whole_files,
)
from pipelines.runtime import tracking
from pipelines.runtime.progress import Progress
from s2t_models import loading
from s2t_models.engines.load import check
from s2t_models.errors import NothingDone, UserError, one_line
from s2t_models.hosting import Hosting, collecting
from s2t_models.locks import locked
from s2t_models.recipe import Recipe
from s2t_models.settings import Role
from s2t_models.storage import Location, remove, write_json
from serving import cluster, placement
from serving.engine_actor import engine_actors
from serving.written import new_board, total


class CollectError(UserError):
    """A collection that cannot begin or go on; the message is one line."""


def collect(
    recipe: Recipe, output: Location, prompts: Location | None = None, data: Path | None = None
) -> dict[str, Any]:
    """Run or finish the collection in `output`; returns its summary, as in `collect.json`.

    Prompts come from the file `prompts` or, without one, from the recipe's task. Raises RecipeError,
    PolicyError, PromptError, ShardError, ClusterError, StoreError, StorageError, CollectError or, where every row
    errored, NothingDone.
    """
    task = f"file:{prompts.name}" if prompts else recipe.collect.task
    chosen = sources.from_file(prompts) if prompts else sources.from_task(task, data, recipe)
    rows = sources.rows(chosen, recipe)
    hosting = collecting(recipe)
    with locked(output):
        metadata = _claim(hosting, output, task, rows)
        work = output / "work"
        if not (output / COLLECTED).is_file():
            tracking.use_store_for(work.is_dir(), f"what is in {work} is kept, and the collection is logged at its end")
            _make(hosting, output, rows, metadata)
        remove(work)
        summary = json.loads((output / COLLECTED).read_text())
        with tracking.costs_nothing(f"{output} is whole, and the same command logs it"):
            log_collection(recipe, output, metadata, summary)
    if errored := sum(summary["errors"].values()):
        first = one_line(summary["first_error"])
        print(f"collect: {errored} of {summary['rows']} rows errored (the first: {first})", file=sys.stderr)
    return summary


def _make(hosting: Hosting, output: Location, rows: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    """Roll out, label and publish. The rows of files that turn out to be damaged are made again, and once those of
    files that hold rows whose calls failed: it may have been the machine's fault, and what is published stays so."""
    work = output / "work"
    checkpoint = work / "checkpoint"

    def make(takes_failed: bool) -> None:
        publish(_run(hosting, work, rows), len(rows), output, metadata, hosting.recipe, takes_failed=takes_failed)

    try:
        try:
            with_whole_files("collect", checkpoint, lambda: make(takes_failed=False), CollectError)
        except FailedRows as error:
            print(f"collect: {error}; these are asked again", file=sys.stderr)
            for path in error.files:
                take_back(path, checkpoint)
            with_whole_files("collect", checkpoint, lambda: make(takes_failed=True), CollectError)
    except NothingDone as error:
        raise NothingDone(f"{error}; put it right and delete {work} to collect again") from None


def report(summary: dict[str, Any], output: Location) -> str:
    """What came out, in a few lines."""
    errors = ", ".join(f"{count} {kind}" for kind, count in summary["errors"].items()) or "none"
    hits = "  ".join(f"@{k} {100 * share:.1f}%" for k, share in summary["hit"].items())
    return "\n".join(
        [
            f"collected    {summary['rows']} rows, {summary['steps']} steps, {summary['kept_steps']} kept",
            f"errors       {errors}",
            f"agreement    teacher's choice is the SLM's at {100 * summary['agreement']:.1f}% of steps",
            f"hit          {hits}  at the top 1% of steps by KL",
            f"written to   {output}",
        ]
    )


def _claim(hosting: Hosting, output: Location, task: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Note whose collection this is, or check that it is this one; returns the shards' metadata, as first
    noted.

    Settings that change no row (actors, batches, serving, training) may differ from those it was begun with.
    """
    recipe = hosting.recipe
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    tokenizer = loading.tokenizer_hash(recipe.slm)
    metadata = shard_metadata(recipe, slm, teacher, tokenizer, task)
    settings = {
        **{f"collect.{key}": value for key, value in recipe.collect.model_dump(exclude={"rollout", "label"}).items()},
        **(deciding(hosting) if recipe.collect.writer == "s2t" else {}),
        **{f"divergence.{key}": value for key, value in recipe.divergence.model_dump().items()},
        **{f"reserved.{key}": value for key, value in recipe.reserved.model_dump().items()},
        **{
            f"{name}.{key}": getattr(getattr(recipe, name), key)
            for name in ("slm", "teacher")
            for key in ("dtype", "context")
        },
        "seed": recipe.seed,
        "SLM weights": slm,
        "teacher weights": teacher,
        "tokenizer": tokenizer,
        "task": task,
        "prompts": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
    }
    path = output / RECORD
    if not path.is_file():
        write_json(path, {"settings": settings, "metadata": metadata})
    record = json.loads(path.read_text())
    different = [key for key, value in settings.items() if record["settings"].get(key) != value]
    if different:
        raise CollectError(
            f"{output}: holds a collection with other settings ({', '.join(different)}); "
            "give the same ones to go on with it, or choose another --output"
        )
    return record["metadata"]


def _run(hosting: Hosting, work: Location, rows: list[dict[str, Any]]) -> list[Location]:
    """Roll out and label what is not done yet; returns the files that hold all labelled rows."""
    recipe, work = hosting.recipe, work.resolve()
    labelled, checkpoint = work / "labelled", work / "checkpoint"
    labelled.mkdir(parents=True, exist_ok=True)
    checkpoint.mkdir(exist_ok=True)
    rows_done = CommittedRows(labelled, checkpoint)
    cluster.start()
    if rows_done() < len(rows):
        for hosted in hosting.engines.values():
            check(hosted)
        collect = recipe.collect
        pools = [collect.rollout, collect.label]
        models = [recipe.slm, recipe.teacher]
        actors = [
            bundle
            for pool, model in zip(pools, models, strict=True)
            for bundle in pool.actors * placement.actor_bundles(model, pool.num_cpus, pool.num_gpus)
        ]
        cluster.require(
            [*actors, *OWN_TASKS],
            f"{recipe.name}: collect with {pools[0].actors} rollout and {pools[1].actors} labelling actors",
        )
        try:
            with ExitStack() as held:
                held.enter_context(on_record(checkpoint))
                asked = pa.Table.from_pylist(rows, PROMPT)
                prompts = rows_left(asked, work / "prompts.parquet", collect.pool(collect.drafter).batch)
                board = new_board()
                made = (_rescued if collect.writer == "s2t" else _labelled)(prompts, hosting, board, held)
                with Progress("collect", "rows", len(rows), rows_done, lambda: total(board)):
                    made.write_datasink(ArrowSink(labelled, LABELLED))
        except ray.exceptions.RayError as error:
            raise CollectError(
                f"{recipe.name}: an actor failed: {one_line(error)}; the same command goes on from {work}"
            ) from error
    return committed(labelled, checkpoint)


def _labelled(prompts: ray.data.Dataset, hosting: Hosting, board: Any, held: ExitStack) -> ray.data.Dataset:
    """One model writes the whole text, and the other one reads it."""
    recipe, engines = hosting.recipe, hosting.engines
    drafter, reader = recipe.collect.drafter, recipe.collect.reader
    writing, reading = (held.enter_context(_pool(recipe, role)) for role in (drafter, reader))
    rollouts = prompts.map_batches(Rollouts, fn_constructor_args=(recipe, engines[drafter], board), **writing)
    return rollouts.map_batches(Labels, fn_constructor_args=(recipe, engines[reader]), **reading)


def _rescued(prompts: ray.data.Dataset, hosting: Hosting, board: Any, held: ExitStack) -> ray.data.Dataset:
    """The SLM writes, and the teacher reads every draft of it."""
    recipe, engines = hosting.recipe, hosting.engines
    writing = held.enter_context(_pool(recipe, "slm"))
    teachers = held.enter_context(engine_actors(engines["teacher"], recipe.collect.label))
    given = recipe, engines["slm"], rescuing(hosting), teachers, board
    return prompts.map_batches(RescuedRollouts, fn_constructor_args=given, **writing)


@contextmanager
def _pool(recipe: Recipe, role: Role) -> Iterator[dict[str, Any]]:
    """Arguments of `map_batches` for the pool of actors that hold an engine of this model, while it is used."""
    stage, model = recipe.collect.pool(role), recipe.slm if role == "slm" else recipe.teacher
    with placement.actor_options(model, stage.num_cpus, stage.num_gpus) as options:
        yield {
            "compute": ActorPoolStrategy(size=stage.actors),
            "batch_size": stage.batch,
            "batch_format": "pyarrow",
            "udf_modifying_row_count": False,
            **options,
        }
