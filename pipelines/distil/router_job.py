"""R2R's router for the baseline of its name: labels on Ray Data, then one short training (`distil --objective router`).

The prompts are those of the training shards. What R2R's labels and router are is in `s2t_models.policies.r2r_labels`,
`s2t_models.router` and `s2t_models.training.router`. Axes: _T step, _F feature.
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from pipelines.data.shards import each_shard
from pipelines.distil.curves import CURVES, Curves
from pipelines.distil.follower import Follower
from pipelines.distil.inputs import DistilError, check_inputs, training_folder
from pipelines.distil.runs import log_trained, open_run
from s2t_models import chat, loading
from s2t_models.artifact import read_provenance, refuse_foreign, replacing
from s2t_models.engines.load import capabilities, load
from s2t_models.engines.metering import Metered
from s2t_models.errors import one_line
from s2t_models.hosting import Hosted, pair
from s2t_models.locks import locked
from s2t_models.policies import r2r_labels
from s2t_models.policies.base import Engines
from s2t_models.policies.r2r_labels import label
from s2t_models.provenance import Provenance, TeacherTokens
from s2t_models.recipe import Recipe
from s2t_models.router import SETTINGS, RouterConfig, save_router
from s2t_models.storage import Location, remove
from s2t_models.threads import use_threads
from s2t_models.training.router import train_router
from serving import cluster, placement

#: One prompt's labelled steps, laid end to end, and the tokens that the teacher read and wrote for them; `error` where
#: the row failed, which costs no other row.
LABELLED = pa.schema(
    [
        ("uid", pa.string()),
        ("inputs", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int8())),
        ("read", pa.int64()),
        ("written", pa.int64()),
        ("error", pa.string()),
    ]
)


class RouterLabels:
    """An actor that holds both engines and labels batches of prompts."""

    def __init__(self, recipe: Recipe, hosted: dict[str, Hosted]) -> None:
        use_threads(recipe.collect.label.num_cpus)
        self.tokenizer = loading.load_tokenizer(hosted["slm"].settings)
        self.slm, self.teacher = load(hosted["slm"]), load(hosted["teacher"])
        self.settings = recipe.router
        self.loop = asyncio.new_event_loop()

    def __call__(self, prompts: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.loop.run_until_complete(self._label(prompts.to_pylist())), LABELLED)

    async def _label(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._row(row) for row in rows)))

    async def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        settings, teacher = self.settings, Metered(self.teacher)
        engines = Engines(
            {"slm": self.slm, "teacher": teacher},
            partial(chat.decode, self.tokenizer),
            partial(chat.encode, self.tokenizer),
        )
        by_teacher = settings.judge == "teacher"
        judge = r2r_labels.ask(teacher, self.tokenizer) if by_teacher else r2r_labels.numbers_differ
        labelled: dict[str, Any] = {"uid": row["uid"]}
        try:
            steps = await label(engines, row["prompt_ids"], judge, settings.max_new_tokens, settings.support)
            labelled |= {"inputs": steps.inputs_TF.ravel(), "labels": steps.labels_T}
        except Exception as error:  # a row that fails is counted, not fatal
            labelled["error"] = f"{type(error).__name__}: {error}"
        return labelled | {"read": teacher.usage.prefill, "written": teacher.usage.decode}


def distil_router(recipe: Recipe, shards: Location, output: Location) -> str:
    """Label the first `router.prompts` prompts of the shards, train the router, write it to `output`; returns a report.

    Raises ShardError, ClusterError, StoreError, ArtifactError or DistilError, each with one line."""
    refuse_foreign(output, SETTINGS)
    settings = {f"router.{key}": value for key, value in recipe.router.model_dump(mode="json").items()}
    provenance = check_inputs(recipe, "router", shards, None, {"router": recipe.router.seed}, settings)
    training, collections = training_folder(output), {"training": shards}
    curves = training / CURVES
    known = read_provenance(output)
    if known is not None and known.has_inputs_of(provenance):
        with locked(training) if training.is_dir() else nullcontext():  # what could not be logged is there
            log_trained(recipe, known, output, collections, training, Follower(curves), None)
        return f"trained      before, with the same inputs and settings\nis in        {output}"
    with locked(training):
        remove(curves)  # of a router that was not finished
        with open_run(recipe, provenance, collections, has_begun=False) as run:
            prompts = _prompts(shards, recipe.router.prompts)
            report, done = _label_and_train(recipe, prompts, output.resolve(), provenance, Curves(curves))
        log_trained(recipe, done, output, collections, training, Follower(curves), run)
    return f"{report}\nwritten to   {output}"


def _label_and_train(
    recipe: Recipe, prompts: pa.Table, output: Location, provenance: Provenance, curves: Curves
) -> tuple[str, Provenance]:
    """A report, and the provenance as written."""
    if "features" not in capabilities(pair(recipe)["slm"]):
        raise DistilError(
            f"{recipe.name}: the router learns from the SLM's hidden states, which a {recipe.slm.engine} engine "
            "does not give; train it with --set slm.engine=torch"
        )
    cluster.start()
    stage = recipe.collect.label
    # A teacher on several GPUs asks for a placement group of its own, beside what the actor takes for the SLM.
    gpus = stage.num_gpus + (recipe.teacher.gpus if placement.bundles(recipe.teacher, stage.num_cpus) else 0)
    cluster.require(stage.actors * stage.num_cpus, stage.actors * gpus, f"{recipe.name}: router labels")
    labelled = ray.data.from_arrow(prompts).repartition(max(stage.actors, -(-len(prompts) // stage.batch)))
    rows = labelled.map_batches(
        RouterLabels,
        fn_constructor_args=(recipe, pair(recipe)),
        batch_size=stage.batch,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=stage.actors),
        num_cpus=stage.num_cpus,
        num_gpus=stage.num_gpus,
    )
    try:
        parts = [part for part in ray.get(rows.to_arrow_refs()) if len(part)]
    except ray.exceptions.RayError as error:
        raise DistilError(f"labelling failed: {one_line(error)}; the same command tries again") from error
    steps = pa.concat_tables(parts).sort_by("uid")  # they come as they are done, and a training goes by their order
    whole = steps.filter(steps["error"].is_null())
    # What the collection asked of the teacher is not used: its prompts are labelled anew.
    read, written = (pc.sum(steps[name]).as_py() or 0 for name in ("read", "written"))
    done = provenance.model_copy(update={"teacher": TeacherTokens(read=read, written=written)})
    hidden = loading.load_config(recipe.slm).hidden_size
    inputs_TF = whole["inputs"].combine_chunks().flatten().to_numpy().reshape(-1, 2 * hidden + recipe.router.support)
    labels_T = whole["labels"].combine_chunks().flatten().to_numpy()
    train = ray.remote(num_cpus=recipe.distil.num_cpus, num_gpus=recipe.distil.num_gpus)(_train)
    try:
        history, threshold = ray.get(train.remote(inputs_TF, labels_T, hidden, recipe, output, done))
    except ray.exceptions.RayError as error:
        if isinstance(unfit := getattr(error, "cause", None), ValueError):  # these steps can train none
            raise DistilError(f"{recipe.name}: {unfit}") from error
        raise DistilError(f"training the router failed: {one_line(error)}; the same command tries again") from error
    for metrics in history:
        curves.add(int(metrics["epoch"]), {f"router/{name}": value for name, value in metrics.items()})
    curves.add(len(history), {"router/threshold": threshold, "router/divergent": float(labels_T.mean())})
    report = (
        f"labelled     {len(labels_T)} steps of {len(whole)} answers ({len(steps) - len(whole)} failed), "
        f"{labels_T.mean():.1%} divergent\n"
        f"trained      the router, {len(history)} epochs; threshold {threshold:.3f} at recall "
        f"{recipe.router.recall:g}\n"
        f"teacher      {read:,} tokens read for it, {written:,} written"
    )
    return report, done


def _prompts(shards: Location, most: int) -> pa.Table:
    """The first rows of the collection that have no error."""
    parts: list[pa.Table] = []
    for table in each_shard(shards):
        parts.append(table.filter(table["error"].is_null()).select(["uid", "prompt_ids"]))
        if sum(len(part) for part in parts) >= most:
            break
    return pa.concat_tables(parts).slice(0, most)


def _train(
    inputs_TF: np.ndarray,
    labels_T: np.ndarray,
    hidden: int,
    recipe: Recipe,
    output: Location,
    provenance: Provenance,
) -> tuple[list[dict[str, float]], float]:
    """Train on the SLM's device and write the router; returns each epoch's figures and the threshold."""
    use_threads(recipe.distil.num_cpus)
    settings = recipe.router
    sizes = RouterConfig(
        hidden, settings.support, settings.width, settings.blocks, settings.expansion, settings.dropout
    )
    history: list[dict[str, float]] = []
    trained = train_router(
        np.array(inputs_TF), np.array(labels_T), sizes, settings, loading.device_of(recipe.slm), history.append
    )
    with replacing(output, SETTINGS) as parts:
        save_router(trained, parts)
        provenance.write(parts)
    return history, trained.settings.threshold
