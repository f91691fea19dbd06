"""R2R's router for the baseline of its name: labels on Ray Data, then one short training (`distil --objective router`).

The prompts are those of the training shards. What R2R's labels and router are is in `s2t_models.policies.r2r_labels`,
`s2t_models.router` and `s2t_models.training.router`. Labels lie in `<output>.training` until the router is there
(`router_labels`): the same command goes on with those that are missing. A task with the training's resources reads
them, in the order of the prompts' uids, so that the router is the same whatever order they were made in.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import ray

from pipelines.data.shards import each_shard
from pipelines.data.sink import DamagedFiles, with_whole_files
from pipelines.distil.curves import CURVES, Curves
from pipelines.distil.follower import Follower
from pipelines.distil.inputs import DistilError, check_inputs, training_folder
from pipelines.distil.router_labels import PROMPT, Survey, checkpoint_of, label_prompts, read_steps, survey
from pipelines.distil.runs import log_trained, open_run
from s2t_models import loading
from s2t_models.artifact import read_provenance, refuse_foreign, replacing
from s2t_models.engines.load import capabilities
from s2t_models.errors import NothingDone, one_line
from s2t_models.hosting import pair
from s2t_models.locks import locked
from s2t_models.provenance import Provenance, TeacherTokens
from s2t_models.recipe import Recipe
from s2t_models.router import SETTINGS, RouterConfig, save_router
from s2t_models.storage import Location, remove
from s2t_models.threads import use_threads
from s2t_models.training.router import train_router
from serving import cluster


def distil_router(recipe: Recipe, shards: Location, output: Location) -> str:
    """Label the first `router.prompts` prompts of the shards, train the router, write it to `output`; returns a report.
    Labels that an earlier run has made are taken as they are.

    Raises ShardError, ClusterError, StoreError, StorageError, ArtifactError or DistilError, each with one line, and
    NothingDone where every prompt failed."""
    refuse_foreign(output, SETTINGS)
    settings = {f"router.{key}": value for key, value in recipe.router.model_dump(mode="json").items()}
    provenance = check_inputs(recipe, "router", shards, None, {"router": recipe.router.seed}, settings)
    training, collections = training_folder(output), {"training": shards}
    curves, state = training / CURVES, training / _name(recipe, provenance)
    known = read_provenance(output)
    if known is not None and known.has_inputs_of(provenance):
        with locked(training) if training.is_dir() else nullcontext():  # what could not be logged is there
            log_trained(recipe, known, output, collections, training, Follower(curves), None)
        return f"trained      before, with the same inputs and settings\nis in        {output}"
    has_begun = state.is_dir()
    with locked(training):
        remove(curves)  # of a router that was not finished
        with open_run(recipe, provenance, collections, has_begun) as run:
            prompts = _prompts(shards, recipe.router.prompts)
            report, done = _label_and_train(recipe, prompts, state, output.resolve(), provenance, Curves(curves))
        log_trained(recipe, done, output, collections, training, Follower(curves), run)
    return f"{report}\nwritten to   {output}"


def _name(recipe: Recipe, provenance: Provenance) -> str:
    """The folder of the labels, by all that decides them."""
    models = {name: getattr(recipe, name) for name in ("slm", "teacher")}
    decides = [
        recipe.router.model_dump(include={"prompts", "max_new_tokens", "judge", "support"}),
        {name: [model.dtype, model.context] for name, model in models.items()},
        [provenance.base_weights, provenance.teacher_weights, provenance.tokenizer, provenance.shards],
    ]
    return f"router-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]}"


def _label_and_train(
    recipe: Recipe, prompts: pa.Table, state: Location, output: Location, provenance: Provenance, curves: Curves
) -> tuple[str, Provenance]:
    """A report, and the provenance as written."""
    if "features" not in capabilities(pair(recipe)["slm"]):
        raise DistilError(
            f"{recipe.name}: the router learns from the SLM's hidden states, which a {recipe.slm.engine} engine "
            "does not give; train it with --set slm.engine=torch"
        )
    cluster.start()

    def attempt() -> tuple[Survey, Provenance, list[dict[str, float]], float]:
        files = label_prompts(recipe, prompts, state)
        found = _on_the_cluster(recipe, state, "reading the labels", survey, files, len(prompts))
        _check(found, state)
        # What the collection asked of the teacher is not used: its prompts are labelled anew.
        asked = TeacherTokens(read=int(found.read_P.sum()), written=int(found.written_P.sum()))
        done = provenance.model_copy(update={"teacher": asked})
        trained = _on_the_cluster(recipe, state, "training the router", _train, files, found, recipe, output, done)
        return found, done, *trained

    found, done, history, threshold = with_whole_files("distil", checkpoint_of(state), attempt, DistilError)
    steps, failed = int(found.steps_P.sum()), len(found.errors)
    divergent = float(found.divergent_P.sum() / steps)
    for metrics in history:
        curves.add(int(metrics["epoch"]), {f"router/{name}": value for name, value in metrics.items()})
    curves.add(len(history), {"router/threshold": threshold, "router/divergent": divergent})
    assert done.teacher is not None
    report = (
        f"labelled     {steps} steps of {len(prompts) - failed} answers ({failed} failed), {divergent:.1%} divergent\n"
        f"trained      the router, {len(history)} epochs; threshold {threshold:.3f} at recall "
        f"{recipe.router.recall:g}\n"
        f"teacher      {done.teacher.read:,} tokens read for it, {done.teacher.written:,} written"
    )
    return report, done


def _check(found: Survey, state: Location) -> None:
    """Say how many prompts failed, and why the first one did. Raises NothingDone where all of them did, and DistilError
    where one is in no file."""
    count, failed = len(found.file_P), len(found.errors)
    if found.missing:
        raise DistilError(f"{state}: {found.missing} of {count} prompts are not labelled; delete it and label again")
    if not found.errors:
        return
    first = one_line(found.first_error or "")
    if failed == count:
        raise NothingDone(
            f"all {count} prompts failed, and there is nothing to train on (the first: {first}); put it right and "
            f"delete {state} to label again"
        )
    print(f"distil: {failed} of {count} prompts failed (the first: {first})", file=sys.stderr)


def _on_the_cluster(recipe: Recipe, state: Location, doing: str, work: Any, *arguments: Any) -> Any:
    """What `work(*arguments)` returns as a task with the training's resources. Raises DamagedFiles as it does, and
    DistilError."""
    task = ray.remote(num_cpus=recipe.distil.num_cpus, num_gpus=recipe.distil.num_gpus)(work)
    try:
        return ray.get(task.remote(*arguments))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, DamagedFiles):
            raise cause from None
        if isinstance(cause, ValueError):  # these steps can train none
            raise DistilError(f"{recipe.name}: {cause}") from None
        raise DistilError(f"{doing} failed: {one_line(error)}; the same command goes on from {state}") from error


def _prompts(shards: Location, most: int) -> pa.Table:
    """The first rows of the collection that have no error, in the order of their uids."""
    parts: list[pa.Table] = []
    for table in each_shard(shards):
        parts.append(table.filter(table["error"].is_null()).select(["uid", "prompt_ids"]))
        if sum(len(part) for part in parts) >= most:
            break
    chosen = pa.concat_tables(parts).slice(0, most).sort_by("uid")
    return chosen.add_column(0, "index", pa.array(range(len(chosen)), pa.int64())).cast(PROMPT)


def _train(
    files: Sequence[Location], found: Survey, recipe: Recipe, output: Location, provenance: Provenance
) -> tuple[list[dict[str, float]], float]:
    """Train on the SLM's device on the steps in the files and write the router; returns each epoch's figures and the
    threshold. Raises DamagedFiles, and ValueError as `train_router` does."""
    use_threads(recipe.distil.num_cpus)
    settings, hidden = recipe.router, loading.load_config(recipe.slm).hidden_size
    sizes = RouterConfig(
        hidden, settings.support, settings.width, settings.blocks, settings.expansion, settings.dropout
    )
    inputs_TF, labels_T = read_steps(files, found, sizes.states * hidden + settings.support)
    history: list[dict[str, float]] = []
    trained = train_router(inputs_TF, labels_T, sizes, settings, loading.device_of(recipe.slm), history.append)
    with replacing(output, SETTINGS) as parts:
        save_router(trained, parts)
        provenance.write(parts)
    return history, trained.settings.threshold
