"""What each Ray Train worker runs: the trainer's steps, with evaluations, checkpoints and curves.

A checkpoint is reported with every evaluation. A worker group that is started again (after a killed worker, or by
running the same command again) takes up the latest one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil.curves import Curves
from s2t_models.recipe import Recipe
from s2t_models.storage import location
from s2t_models.threads import use_threads
from s2t_models.training.trainer import Trainer

STATE = "state.pt"
#: The figure of a checkpoint that says what the teacher has read so far, where it reads as the model is trained.
TEACHER_READ = "teacher_read"
#: Between two entries of the training curves, which progress follows: optimiser steps, or seconds where these are long.
LOG_EVERY, LOG_EVERY_S = 20, 30.0


def train(config: dict[str, Any]) -> None:
    """The training loop. `config`: recipe (JSON), objective (name), shards, curves (folders, by path or
    URI)."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    recipe = Recipe.model_validate_json(config["recipe"])
    use_threads(recipe.distil.num_cpus)
    data = ShardTrajectories(location(config["shards"]))
    trainer = Trainer(recipe, config["objective"], data, rank, world, wrap=ray.train.torch.prepare_model)
    if checkpoint := ray.train.get_checkpoint():
        trainer.load(read_state(checkpoint))
    curves = Curves(location(config["curves"])) if rank == 0 else None
    if curves:
        curves.begin(trainer.step)
    total, every = recipe.distil.steps, recipe.distil.evaluate_every
    recent: list[dict[str, float]] = []
    logged = time.monotonic()
    while trainer.step < total:
        recent.append(trainer.advance())
        is_evaluated = trainer.step % every == 0 or trainer.step == total
        is_due = trainer.step % LOG_EVERY == 0 or time.monotonic() - logged >= LOG_EVERY_S
        if curves and (is_due or is_evaluated):
            logged = time.monotonic()
            means = {f"train/{name}": sum(parts[name] for parts in recent) / len(recent) for name in recent[0]}
            curves.add(trainer.step, means)
            recent.clear()
        if is_evaluated:
            metrics = trainer.evaluate()
            if trainer.objective.on_policy:
                metrics[TEACHER_READ] = trainer.teacher_read
            if curves:
                curves.add(trainer.step, {f"validation/{name}": value for name, value in metrics.items()})
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    torch.save(trainer.state(), Path(folder) / STATE)
                saved = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
                ray.train.report({"step": trainer.step, **metrics}, checkpoint=saved)


def read_state(checkpoint: ray.train.Checkpoint) -> dict[str, Any]:
    """The trainer's state in a checkpoint, on the CPU."""
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE, map_location="cpu", weights_only=True)
