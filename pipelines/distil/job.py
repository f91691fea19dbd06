"""Distil: shards -> selector and trigger head (an artifact), or the kd control (a plain checkpoint), on Ray Train; or R2R's router.

    python -m pipelines.distil --recipe cluster/recipes/embedded.yaml --shards runs/train \\
        --calibration runs/calibration --output runs/artifact
    python -m pipelines.distil --recipe cluster/recipes/embedded.yaml --shards runs/train \\
        --objective kd --output runs/kd

The training survives killed workers, and a job that was killed: the same command goes on from the last checkpoint, which
lies in `<output>.training` until the job is done. That folder must be on a file system that all nodes share.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.data.shards import FOLDER, ShardError, check_pair, questions, read_shards
from pipelines.distil.worker import read_state, train
from pipelines.runtime import tracking
from pipelines.runtime.progress import Progress
from pipelines.tasks import TASKS
from pipelines.tasks.splits import refuse_overlap
from s2t_models import loading
from s2t_models.artifact import CARD, CHECKPOINT, read_provenance, refuse_foreign
from s2t_models.errors import UserError
from s2t_models.files import locked
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.training.batches import Trajectory, trajectories
from s2t_models.training.build import build
from s2t_models.training.trainer import Objective
from serving import cluster

#: Worker groups that may die before the job gives up.
MAX_FAILURES = 3
#: Ends of the names of tasks whose rows may be trained or calibrated on; the other benchmark tasks are test splits.
NOT_TEST = ("-train", "-calibration", "-validation")


class DistilError(UserError):
    """A training that cannot begin or go on; the message is one line."""


def distil(
    recipe: Recipe,
    shards: Path,
    output: Path,
    objective: Objective = "selector",
    calibration: Path | None = None,
) -> dict[str, Any]:
    """Train, or finish training, and write `output`; returns the summary that the output's provenance holds too. An output of
    the same inputs and settings is left as it is.

    Raises RecipeError, ShardError, ClusterError, ArtifactError or DistilError.
    """
    settings = recipe.distil
    if settings.batch % settings.workers:
        raise RecipeError(f"distil.batch = {settings.batch} does not divide among distil.workers = {settings.workers}")
    refuse_foreign(output, CARD if objective == "selector" else CHECKPOINT)
    provenance = _check(recipe, objective, shards, calibration)
    known = read_provenance(output)
    if all(known.get(key) == value for key, value in provenance.items() if key != "recipe"):
        return known
    training = beside(output)
    cluster.start()
    cluster.require(
        settings.workers * settings.num_cpus,
        settings.workers * settings.num_gpus,
        f"{recipe.name}: distil with {settings.workers} workers",
    )
    with locked(training):
        tracking.use_store()
        with tracking.start_run(
            f"distil-{objective}", params={"recipe": recipe.model_dump(), "objective": objective}
        ) as run:
            best, metrics, begun = _train(recipe, objective, shards.resolve(), training, provenance, run)
            provenance |= {"validation": metrics, "begun_at_steps": begun}
            figures = _build(recipe, objective, best, shards, calibration, provenance, output.resolve())
            tracking.log_metrics({**{f"best/{name}": value for name, value in metrics.items()}, **figures})
            tracking.log_text(json.dumps(provenance, indent=2), "provenance.json")
        shutil.rmtree(training)
    return read_provenance(output)


def report(summary: dict[str, Any], output: Path) -> str:
    """What came out, in a few lines."""
    metrics = summary["validation"]
    lines = [
        f"trained      {summary['objective']}, {summary['settings']['distil.steps']} steps; the best checkpoint is that of step {metrics['step']:.0f}",
        f"Agree@1      {100 * metrics['agree_at_1']:.1f}% on held-out top steps (the SLM's own ranking: "
        f"{100 * metrics['agree_at_1_slm']:.1f}%), {100 * metrics['agree_at_1_random']:.1f}% on random steps",
        f"Spearman     {metrics['spearman']:.3f}; KL to base {metrics['kl_to_base']:.4f} nats",
    ]
    if "trigger_head" in summary:
        lines.append(f"trigger head AUC {summary['trigger_head']['auc']:.3f}")
    return "\n".join([*lines, f"written to   {output}"])


def beside(output: Path) -> Path:
    """Where the state of an unfinished training lies."""
    return output.resolve().with_name(output.resolve().name + ".training")


def read_training(recipe: Recipe, folder: Path) -> tuple[pa.Table, dict[str, str]]:
    """A collection that may be trained or calibrated on. Raises ShardError where it is of another pair or of a test split."""
    table, metadata = read_shards(folder)
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    check_pair(metadata, slm, teacher, loading.tokenizer_hash(recipe.slm))
    task = metadata["s2t.task"]
    if task in TASKS and not task.endswith(NOT_TEST):
        raise ShardError(f"{folder}: collected on {task}, a test split; train and calibrate on other rows")
    return table, metadata


def _check(recipe: Recipe, objective: Objective, shards: Path, calibration: Path | None) -> dict[str, Any]:
    """Refuse shards of another pair, test prompts, and calibration on training prompts; returns the provenance."""
    hashes: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    divergences: dict[str, str] = {}
    for role, folder in (("training", shards), ("calibration", calibration)):
        if folder is None:
            continue
        table, metadata = read_training(recipe, folder)
        hashes[role] = _digest(folder, table)
        divergences[role] = metadata["s2t.divergence"]
        rows[f"{role} ({metadata['s2t.task']})"] = questions(table)
    if len(set(divergences.values())) > 1:
        of = "; ".join(f"{role}: {divergence}" for role, divergence in divergences.items())
        raise ShardError(f"{calibration}: collected with another divergence than the training shards ({of})")
    try:
        refuse_overlap(rows)
    except ValueError as error:
        raise ShardError(str(error)) from None
    whole = recipe.model_dump(mode="json")
    return {
        "objective": objective,
        "recipe": recipe.digest(),
        "base_weights": metadata["s2t.slm"],
        "teacher_weights": metadata["s2t.teacher"],
        "tokenizer": metadata["s2t.tokenizer"],
        "divergence": divergences["training"],
        "shards": hashes,
        "rows": rows,
        "seeds": {"training": recipe.seed, "trigger_head": recipe.trigger_head.seed},
        "settings": {
            **{f"distil.{key}": value for key, value in whole["distil"].items()},
            **{f"trigger_head.{key}": value for key, value in whole["trigger_head"].items()},
            **{f"reserved.{key}": value for key, value in whole["reserved"].items()},
            "budget": whole["budget"],
            "policies.local_prior_weight": whole["policies"]["local_prior_weight"],
            "slm.dtype": whole["slm"]["dtype"],
        },
    }


def _digest(folder: Path, table: pa.Table) -> str:
    """The sha256 of a collection's shard files. Raises ShardError where none of its rows has a step to learn from."""
    if not pc.sum(pc.list_value_length(table["kept"])).as_py():
        raise ShardError(f"{folder}: no row has a labelled step; collect more prompts")
    digest = hashlib.sha256()
    for path in sorted((folder / FOLDER).iterdir()):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _train(
    recipe: Recipe, objective: Objective, shards: Path, training: Path, provenance: dict[str, Any], run: str
) -> tuple[Any, dict[str, float], list[int]]:
    """Run or finish the training; returns the best trained tensors, their metrics, and the steps at which worker groups began."""
    settings = recipe.distil
    key = json.dumps(
        [recipe.distil.model_dump(), recipe.reserved.model_dump(), recipe.slm.dtype, recipe.seed, provenance["shards"]]
    )
    name = f"{objective}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder = training / name
    folder.mkdir(parents=True, exist_ok=True)
    follower = _Follower(folder / "progress.jsonl", run)
    trainer = TorchTrainer(
        train,
        train_loop_config={
            "recipe": recipe.model_dump_json(),
            "objective": objective,
            "shards": str(shards),
            "progress": str(follower.path),
        },
        torch_config=TorchConfig(backend="nccl" if settings.num_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.num_gpus > 0,
            resources_per_worker={"CPU": settings.num_cpus} | ({"GPU": settings.num_gpus} if settings.num_gpus else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # at run time it is that of Train v2
            name=name,
            storage_path=str(training),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="agree_at_1"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with Progress(f"distil {objective}", "steps", settings.steps, follower.step):
            # In the main thread Ray Train takes Ctrl-C for itself, and ends with status 0.
            result = ThreadPoolExecutor(1).submit(trainer.fit).result()
    except ray.train.TrainingFailedError as error:
        raise DistilError(f"training failed: {_root_cause(error)}; the same command goes on from {training}") from None
    best, metrics = _best(result.best_checkpoints or [])
    numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    return read_state(best)["trained"], numbers, follower.begun


def _best(checkpoints: list[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """The latest checkpoint whose Agree@1 is within one standard error of the highest: a difference that the held-out steps are
    too few to tell is no reason to leave a training early."""
    highest = max(metrics["agree_at_1"] for _, metrics in checkpoints)
    steps = max(metrics["top_steps"] for _, metrics in checkpoints)
    enough = highest - math.sqrt(highest * (1 - highest) / max(steps, 1))
    return max((pair for pair in checkpoints if pair[1]["agree_at_1"] >= enough), key=lambda pair: pair[1]["step"])


def _build(
    recipe: Recipe,
    objective: Objective,
    trained: Any,
    shards: Path,
    calibration: Path | None,
    provenance: dict[str, Any],
    output: Path,
) -> dict[str, float]:
    """Build the artifact on a node with a worker's resources."""

    @ray.remote(num_cpus=recipe.distil.num_cpus, num_gpus=recipe.distil.num_gpus, max_retries=MAX_FAILURES)
    def on_a_worker(tensors: Any) -> dict[str, float]:
        calibrating = _trajectories(calibration) if calibration else None
        return build(recipe, objective, tensors, _trajectories(shards), calibrating, provenance, output)

    try:
        return ray.get(on_a_worker.remote(trained))
    except ray.exceptions.RayTaskError as error:
        raise DistilError(f"building {output.name} failed: {' '.join(str(error.cause).split())}") from None


def _trajectories(folder: Path) -> Sequence[Trajectory]:
    return trajectories(read_shards(folder)[0])


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__


class _Follower:
    """Reads the progress file as it grows, into MLflow. A job that goes on reads the earlier part too, so that its curves are
    whole."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.begun: list[int] = []
        self._offset = self._step = 0

    def step(self) -> int:
        """Log what is new; the last step known."""
        if not self.path.is_file():
            return 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                record = json.loads(line)
                if "begun" in record:
                    self.begun.append(record["begun"])
                else:
                    self._step = record["step"]
                    mlflow.log_metrics(record["metrics"], step=record["step"], run_id=self.run)
        return self._step
