"""Distil: shards to what an objective makes of them (an artifact, or a plain checkpoint), on Ray Train.

    python -m pipelines.distil --recipe cluster/recipes/embedded.yaml --shards runs/train \\
        --calibration runs/calibration --output runs/artifact
    python -m pipelines.distil --recipe cluster/recipes/embedded.yaml --shards runs/train \\
        --objective kd --output runs/kd

The training survives killed workers, and a job that was killed: the same command goes on from the last checkpoint,
which lies in `<output>.training` until the job is done: on a file system that all nodes share, or in an object store.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil.curves import CURVES, Curves
from pipelines.distil.follower import Follower
from pipelines.distil.inputs import DistilError, check_inputs, training_folder
from pipelines.distil.runs import log_trained, open_run
from pipelines.distil.worker import TEACHER_READ, read_state, train
from pipelines.runtime.progress import Progress
from s2t_models.artifact import read_provenance, refuse_foreign
from s2t_models.errors import one_line
from s2t_models.hosting import pinned
from s2t_models.locks import locked
from s2t_models.provenance import Provenance, TeacherTokens
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.storage import Location, ObjectPath
from s2t_models.threads import use_threads
from s2t_models.training import objectives
from s2t_models.training.build import build
from s2t_models.training.evaluation import latest_of_the_best
from s2t_models.training.products import Report
from s2t_models.training.selector import check_targets
from s2t_models.training.teacher import check_teacher
from serving import cluster

#: Worker groups that may die before the job gives up.
MAX_FAILURES = 3
#: Settings of `distil` that change what a training takes and not what it gives, but for rounding: one goes on with
#: others than it began with.
RESOURCES = ("workers", "min_workers", "num_cpus", "num_gpus", "gradient_checkpointing", "base_cache_gb")
#: Seconds between two records of how far the making of a product is.
BUILD_EVERY_S = 2.0
#: How often an elastic training looks whether there is room for more workers.
RESIZE_EVERY_S = 30.0


def distil(
    recipe: Recipe,
    shards: Location,
    output: Location,
    objective: str = "selector",
    calibration: Location | None = None,
) -> Provenance:
    """Train, or finish training, and write `output`; returns its provenance. An output of the same inputs and settings
    is left as it is.

    Raises RecipeError, ShardError, ClusterError, StoreError, ArtifactError or DistilError.
    """
    recipe = pinned(recipe)
    settings = recipe.distil
    if (settings.min_workers or 1) > settings.workers:
        raise RecipeError(f"distil.min_workers = {settings.min_workers} exceeds distil.workers = {settings.workers}")
    if settings.batch % settings.workers:
        raise RecipeError(f"distil.batch = {settings.batch} does not divide among distil.workers = {settings.workers}")
    chosen = objectives.objective(objective, settings)
    check_targets(recipe.slm, chosen.lora)
    if chosen.on_policy:
        check_teacher(recipe)
    refuse_foreign(output, chosen.mark)
    provenance = check_inputs(recipe, objective, shards, calibration, _seeds(recipe), _settings(recipe), chosen.drafter)
    known = read_provenance(output)
    collections = {"training": shards} | ({"calibration": calibration} if calibration else {})
    shards, output = shards.resolve(), output.resolve()
    calibration = calibration and calibration.resolve()
    training = training_folder(output)
    state = training / _name(recipe, provenance)
    curves = Follower(state / CURVES)
    if known is not None and known.has_inputs_of(provenance):
        with locked(training) if training.is_dir() else nullcontext():  # what could not be logged is there
            log_trained(recipe, known, output, collections, training, curves, None)
        return known
    cluster.start()
    cluster.require(
        settings.fewest_workers * [{"CPU": settings.num_cpus, "GPU": settings.num_gpus}],
        f"{recipe.name}: distil with {settings.fewest_workers} workers",
    )
    has_begun = state.is_dir()
    with locked(training):
        with open_run(recipe, provenance, collections, has_begun) as run:
            trained, outcome = _train(recipe, shards, state, provenance.objective, curves, run)
            begun = provenance.model_copy(update=outcome)
            shown = f"distil {objective}: {chosen.trains_after}"
            making = Progress(shown, "%", 100, lambda: curves.percent(run)) if chosen.trains_after else nullcontext()
            with making:
                done = _build(recipe, trained, shards, calibration, begun, output, state / CURVES)
        log_trained(recipe, done, output, collections, training, curves, run)
    return done


def report(done: Provenance, output: Location) -> str:
    """What came out, in a few lines."""
    metrics, steps = done.validation, done.settings["distil.steps"]
    lines = [
        f"trained      {done.objective}, {steps} steps; the best checkpoint is that of step {metrics['step']:.0f}",
        f"Agree@1      {metrics['agree_at_1']:.1%} on held-out top steps (the SLM's own ranking: "
        f"{metrics['agree_at_1_slm']:.1%}), {metrics['agree_at_1_random']:.1%} on random steps",
        f"Spearman     {metrics['spearman']:.3f}; KL to base {metrics['kl_to_base']:.4f} nats",
    ]
    if done.teacher:
        lines.append(f"teacher      {done.teacher.read:,} tokens read for it, {done.teacher.written:,} written")
    if done.trigger_head:
        lines.append(f"trigger head AUC {done.trigger_head['auc']:.3f}")
    if found := done.decider:
        lines.append(
            f"decider      {found['second_passes']:.1%} of the steps take a second pass; {found['recall']:.1%} of the "
            f"hard ones ({found['hard']:.1%}) are among them, AUC {found['auc']:.3f}"
        )
    return "\n".join([*lines, f"written to   {output}"])


def _seeds(recipe: Recipe) -> dict[str, int]:
    return {"training": recipe.seed, "trigger_head": recipe.trigger_head.seed}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """All settings that decide what a training gives, by name."""
    whole = recipe.model_dump(mode="json")
    sections = {
        f"{section}.{key}": value
        for section in ("distil", "trigger_head", "reserved")
        for key, value in whole[section].items()
        if section != "distil" or key not in RESOURCES
    }
    return sections | {
        "budget": whole["budget"],
        "policies.local.prior_weight": whole["policies"]["local"]["prior_weight"],
        "slm.dtype": whole["slm"]["dtype"],
    }


def _name(recipe: Recipe, provenance: Provenance) -> str:
    """The folder of a training's state, by all that decides it."""
    settings = recipe.distil.model_dump(exclude=set(RESOURCES))
    key = json.dumps([settings, recipe.reserved.model_dump(), recipe.slm.dtype, recipe.seed, provenance.shards])
    return f"{provenance.objective}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _train(
    recipe: Recipe, shards: Location, state: Location, objective: str, curves: Follower, run: str | None
) -> tuple[Any, dict[str, Any]]:
    """Run or finish the training in the folder `state`; returns the best trained tensors, and the outcome for the
    provenance."""
    settings, training = recipe.distil, state.parent
    state.mkdir(parents=True, exist_ok=True)
    workers = (settings.min_workers, settings.workers) if settings.min_workers else settings.workers
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "objective": objective,
            "shards": str(shards),
            "curves": str(state / CURVES),
        },
        torch_config=TorchConfig(backend="nccl" if settings.num_gpus else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # at run time it is that of Train v2
            num_workers=workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
            use_gpu=settings.num_gpus > 0,
            resources_per_worker={"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # at run time it is that of Train v2
            name=state.name,
            storage_path=training.key if isinstance(training, ObjectPath) else str(training),
            storage_filesystem=training.file_system if isinstance(training, ObjectPath) else None,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="agree_at_1"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with Progress(f"distil {objective}", "steps", settings.steps, lambda: curves.step(run)):
            # In the main thread Ray Train takes Ctrl-C for itself, and ends with status 0.
            result = ThreadPoolExecutor(1).submit(trainer.fit).result()
    except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
        raise DistilError(f"training failed: {_root_cause(error)}; the same command goes on from {training}") from error
    checkpoints = result.best_checkpoints or []
    best, metrics = latest_of_the_best(checkpoints)
    figures = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    outcome: dict[str, Any] = {"validation": figures, "begun_at_steps": tuple(curves.begun)}
    # What was read after the checkpoint that is taken was read for it too: it chose among them.
    if read := max(metrics.get(TEACHER_READ, 0) for _, metrics in checkpoints):
        outcome["teacher"] = TeacherTokens(read=int(read))
    return read_state(best)["trained"], outcome


def _build(
    recipe: Recipe,
    trained: Any,
    shards: Location,
    calibration: Location | None,
    provenance: Provenance,
    output: Location,
    curves: Location,
) -> Provenance:
    """Build the product on a node with a worker's resources; returns its provenance as written. How far it is goes to
    the log `curves`."""

    @ray.remote(num_cpus=recipe.distil.num_cpus, num_gpus=recipe.distil.num_gpus, max_retries=MAX_FAILURES)
    def on_a_worker(tensors: Any) -> Provenance:
        use_threads(recipe.distil.num_cpus)
        calibrating = ShardTrajectories(calibration) if calibration else None
        return build(recipe, tensors, ShardTrajectories(shards), calibrating, provenance, output, _noting(curves))

    try:
        return ray.get(on_a_worker.remote(trained))
    except ray.exceptions.RayError as error:
        raise DistilError(
            f"building {output.name} failed: {one_line(error)}; the same command goes on with the trained checkpoint"
        ) from error


def _noting(folder: Location) -> Report:
    """Notes in the log of the curves what the making of a product says of itself, now and then and at its end."""
    curves, noted = Curves(folder), -math.inf

    def note(share: float, figures: dict[str, float]) -> None:
        nonlocal noted
        if share >= 1 or time.monotonic() - noted >= BUILD_EVERY_S:
            noted = time.monotonic()
            curves.build(share, figures)

    return note


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
