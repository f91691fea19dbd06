"""Collect: prompts -> SLM rollouts -> teacher labels -> Arrow shards, on Ray Data (section 4.3, D.2).

    python -m pipelines.collect --recipe cluster/recipes/embedded.yaml --output runs/train
    python -m pipelines.collect --recipe cluster/recipes/embedded.yaml --output runs/calibration \\
        --task embedded-calibration --set collect.sampled=0 --set collect.prompts=600

Rollout actors hold an SLM engine, labelling actors a teacher engine; both are pools sized by the recipe. With
`collect.writer` = teacher (`--teacher`) it is the teacher that writes and the SLM that reads. The job can be
killed at any moment: the same command goes on where it stopped and ends with the same shards. `work` in the
output folder holds what a running collection needs and is gone at the end; the output is on a file system that
all nodes share, or in an object store.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import ray
from ray.data import ActorPoolStrategy
from ray.data.checkpoint import CheckpointConfig

from pipelines.collect import prompts as sources
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.publish import DamagedFiles, publish
from pipelines.collect.runs import log_collection
from pipelines.collect.schemas import PROMPT
from pipelines.collect.sink import ArrowSink, CommittedRows, committed, filesystem_of, take_back
from pipelines.data.layout import COLLECTED, RECORD
from pipelines.data.shards import shard_metadata
from pipelines.runtime import tracking
from pipelines.runtime.progress import Progress
from s2t_models import loading
from s2t_models.engines.load import check
from s2t_models.errors import NothingDone, UserError, one_line
from s2t_models.hosting import Hosted, pair
from s2t_models.locks import locked
from s2t_models.recipe import Recipe
from s2t_models.settings import Writer
from s2t_models.storage import Location, ObjectPath, remove, whole, write_json
from serving import cluster, placement
from serving.written import new_board, total

#: How often files are damaged before the collection gives up.
TRIES = 3


class CollectError(UserError):
    """A collection that cannot begin or go on; the message is one line."""


def collect(
    recipe: Recipe, output: Location, prompts: Location | None = None, data: Path | None = None
) -> dict[str, Any]:
    """Run or finish the collection in `output`; returns its summary, as in `collect.json`.

    Prompts come from the file `prompts` or, without one, from the recipe's task. Raises RecipeError,
    PromptError, ShardError, ClusterError, StoreError, StorageError, CollectError or, where every row errored,
    NothingDone.
    """
    task = f"file:{prompts.name}" if prompts else recipe.collect.task
    chosen = sources.from_file(prompts) if prompts else sources.from_task(task, data, recipe)
    rows = sources.rows(chosen, recipe)
    engines = pair(recipe)
    with locked(output):
        metadata = _claim(recipe, output, task, rows)
        work = output / "work"
        if not (output / COLLECTED).is_file():
            tracking.use_store_for(work.is_dir(), f"what is in {work} is kept, and the collection is logged at its end")
            _make(recipe, engines, output, rows, metadata)
        remove(work)
        summary = json.loads((output / COLLECTED).read_text())
        with tracking.costs_nothing(f"{output} is whole, and the same command logs it"):
            log_collection(recipe, output, metadata, summary)
    if errored := sum(summary["errors"].values()):
        first = one_line(summary["first_error"])
        print(f"collect: {errored} of {summary['rows']} rows errored (the first: {first})", file=sys.stderr)
    return summary


def _make(
    recipe: Recipe,
    engines: Mapping[str, Hosted],
    output: Location,
    rows: list[dict[str, Any]],
    metadata: dict[str, str],
) -> None:
    """Roll out, label and publish; the rows of files that turn out to be damaged are made again."""
    work = output / "work"
    for left in reversed(range(TRIES)):
        try:
            publish(_run(recipe, engines, work, rows), len(rows), output, metadata, recipe)
            return
        except NothingDone as error:
            raise NothingDone(f"{error}; put it right and delete {work} to collect again") from None
        except DamagedFiles as error:
            for path, reason in error.files:
                print(f"collect: {path}: {reason}; its rows are made again", file=sys.stderr)
                take_back(path, work / "checkpoint")
            if not left:
                path, reason = error.files[0]
                raise CollectError(f"{path}: {reason}, for the {TRIES}th time; see to the disk") from None


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


def _claim(recipe: Recipe, output: Location, task: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Note whose collection this is, or check that it is this one; returns the shards' metadata, as first
    noted.

    Settings that change no row (actors, batches, serving, training) may differ from those it was begun with.
    """
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    tokenizer = loading.tokenizer_hash(recipe.slm)
    metadata = shard_metadata(recipe, slm, teacher, tokenizer, task)
    settings = {
        **{f"collect.{key}": value for key, value in recipe.collect.model_dump(exclude={"rollout", "label"}).items()},
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


def _run(recipe: Recipe, engines: Mapping[str, Hosted], work: Location, rows: list[dict[str, Any]]) -> list[Location]:
    """Roll out and label what is not done yet; returns the files that hold all labelled rows."""
    work = work.resolve()
    labelled, checkpoint = work / "labelled", work / "checkpoint"
    labelled.mkdir(parents=True, exist_ok=True)
    checkpoint.mkdir(exist_ok=True)
    rows_done = CommittedRows(labelled, checkpoint)
    cluster.start()
    if rows_done() < len(rows):
        for hosted in engines.values():
            check(hosted)
        collect = recipe.collect
        # One CPU more reads and writes, and one filters out what an earlier run has done.
        pools = [collect.rollout, collect.label]
        models = [recipe.slm, recipe.teacher]
        writer, reader = collect.writer, collect.reader
        cpus = sum(pool.num_cpus * pool.actors for pool in pools)
        gpus = sum(
            placement.gpus(model, pool.num_gpus) * pool.actors for pool, model in zip(pools, models, strict=True)
        )
        cluster.require(
            cpus + 2,
            gpus,
            f"{recipe.name}: collect with {pools[0].actors} rollout and {pools[1].actors} labelling actors",
        )
        prompts = work / "prompts.parquet"
        with whole(prompts) as part:
            parquet.write_table(pa.Table.from_pylist(rows, PROMPT), part)
        context = ray.data.DataContext.get_current()
        context.checkpoint_config = CheckpointConfig(
            "uid",
            str(checkpoint),
            delete_checkpoint_on_success=False,
            override_filesystem=checkpoint.file_system if isinstance(checkpoint, ObjectPath) else None,
        )
        # Ray's newer reader starts a dozen processes to read the footers of what is one file.
        newer_reader, context.use_datasource_v2 = context.use_datasource_v2, False
        context.checkpoint_config.checkpoint_actor_memory_bytes = 64 * 1024**2
        context.checkpoint_config.checkpoint_actor_pool_max_size = 1
        try:
            dataset = ray.data.read_parquet(str(prompts), override_num_blocks=1, **filesystem_of(prompts))
            # A block is written, committed, and at most lost where something is killed, as one.
            dataset = dataset.repartition(target_num_rows_per_block=collect.pool(writer).batch)
            board = new_board()
            dataset = dataset.map_batches(
                Rollouts, fn_constructor_args=(recipe, engines[writer], board), **_pool(recipe, writer)
            )
            dataset = dataset.map_batches(
                Labels, fn_constructor_args=(recipe, engines[reader]), **_pool(recipe, reader)
            )
            with Progress("collect", "rows", len(rows), rows_done, lambda: total(board)):
                dataset.write_datasink(ArrowSink(labelled))
        except ray.exceptions.RayError as error:
            raise CollectError(
                f"{recipe.name}: an actor failed: {one_line(error)}; the same command goes on from {work}"
            ) from error
        finally:
            context.checkpoint_config, context.use_datasource_v2 = None, newer_reader
    return committed(labelled, checkpoint)


def _pool(recipe: Recipe, role: Writer) -> dict[str, Any]:
    """Arguments of `map_batches` for the pool of actors that hold an engine of this model."""
    stage, model = recipe.collect.pool(role), recipe.slm if role == "slm" else recipe.teacher
    return {
        "compute": ActorPoolStrategy(size=stage.actors),
        "batch_size": stage.batch,
        "batch_format": "pyarrow",
        "udf_modifying_row_count": False,
        **placement.actor_options(model, stage.num_cpus, stage.num_gpus),
    }
