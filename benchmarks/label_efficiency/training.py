"""One training in this process: what `s2t distil` does on Ray Train with one worker."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file, save_file

from benchmarks.label_efficiency.labels import collection
from benchmarks.label_efficiency.plan import SYSTEMS, Experiment, Point
from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil.inputs import check_inputs
from s2t_models.errors import UserError
from s2t_models.provenance import TeacherTokens
from s2t_models.storage import write_json
from s2t_models.training.build import build
from s2t_models.training.evaluation import latest_of_the_best
from s2t_models.training.trainer import Trainer

#: In a training's folder: what it took, written last; and the tensors that were trained.
OUTCOME, TENSORS = "outcome.json", "trained.safetensors"


@dataclass(frozen=True)
class Outcome:
    """What a training took: optimiser steps, texts that the teacher read or wrote for it, and its tokens for them."""

    steps: int
    texts: int
    teacher_read: int
    teacher_written: int


def train(experiment: Experiment, point: Point) -> Outcome:
    """Train what the point decodes with, unless that is done; returns what it took. Raises UserError, and ValueError
    where there are too few labels to train on."""
    for other in point.takes:
        if not (experiment.place(other) / OUTCOME).is_file():
            raise UserError(f"{point.name}: {other.name}, which it takes up, is not trained")
    place = experiment.place(point)
    if (place / OUTCOME).is_file():
        return Outcome(**json.loads((place / OUTCOME).read_text()))
    kd, from_kd = point.kd, point.from_kd
    shards, chosen = collection(experiment, point), experiment.objective(point)
    name, recipe = SYSTEMS[point.system].objective, experiment.training(point)
    settings = {"distil.steps": recipe.distil.steps}
    provenance = check_inputs(recipe, name, shards, None, {"training": recipe.seed}, settings, chosen.drafter)
    if kd and from_kd == "model":
        slm = recipe.slm.model_copy(update={"path": str(experiment.model(kd)), "revision": None})
        recipe = recipe.model_copy(update={"slm": slm})
    data = ShardTrajectories(shards)
    trainer = Trainer(recipe, name, data)
    if kd and from_kd == "lora":
        begun = load_file(experiment.place(kd) / TENSORS)
        trainer.selector.load_trained(trainer.selector.trained() | begun)
    trained, figures = _best(trainer)
    texts, teacher = len(data), provenance.teacher or TeacherTokens()
    if chosen.on_policy:  # the labels are those of the held-out prompts alone
        texts = len(trainer.validation) + recipe.distil.steps * recipe.distil.batch
        teacher = TeacherTokens(read=trainer.teacher_read)
    provenance = provenance.model_copy(update={"validation": figures, "teacher": teacher})
    build(recipe, trained, data, None, provenance, experiment.model(point))
    save_file(trained, place / TENSORS)
    outcome = Outcome(recipe.distil.steps, texts, teacher.read, teacher.written)
    write_json(place / OUTCOME, asdict(outcome))
    return outcome


def _best(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Train to the end; returns the tensors that are taken, and their figures."""
    checkpoints = []
    while trainer.step < trainer.settings.steps:
        trainer.advance()
        if trainer.step % trainer.settings.evaluate_every == 0 or trainer.step == trainer.settings.steps:
            tensors = {key: value.clone() for key, value in trainer.selector.trained().items()}
            checkpoints.append((tensors, {"step": float(trainer.step), **trainer.evaluate()}))
    tensors, figures = latest_of_the_best(checkpoints)
    return tensors, dict(figures)
