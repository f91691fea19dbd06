"""Objectives by name: one that is added by its class alone, and training where Ray, Arrow and MLflow are absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from labelled_rows import labelled_rows
from made_up import provenance

from s2t_models.artifact import read_provenance
from s2t_models.errors import UserError
from s2t_models.loading import load_model
from s2t_models.recipe import load_recipe
from s2t_models.settings import ModelSettings
from s2t_models.training.batches import Batch, trajectories
from s2t_models.training.build import build
from s2t_models.training.objectives import OBJECTIVES, objective
from s2t_models.training.objectives.base import Objective, Outputs, Term
from s2t_models.training.selector import ROWS
from s2t_models.training.trainer import Trainer

SETTINGS = ["distil.batch=4", "distil.validation=0.2", "distil.min_teacher_margin=0", "distil.learning_rate=0.01"]


class SoftLabels(Objective):
    """An ablation of D.4: the reserved rows alone are trained, to give the teacher's probabilities of the
    candidates."""

    needs_leaves = True

    def trains(self, parameter: str) -> bool:
        return parameter == ROWS

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        teacher_GK = batch.teacher_logprobs_GK.softmax(-1)
        student_GK = (outputs.scores_GK / self.settings.temperature).log_softmax(-1)
        return [Term("soft_loss", -(teacher_GK * student_GK).sum(-1).mean(), 1.0, per="groups")]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.scores_GK, batch.candidates_GK.gather(1, outputs.scores_GK.argmax(-1, keepdim=True))[:, 0]


def test_an_objective_is_added_by_its_class_alone(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OBJECTIVES, "soft", f"{__name__}:SoftLabels")
    recipe = load_recipe(recipe_path, SETTINGS)
    data = trajectories(labelled_rows(recipe, "embedded-train", 10))
    trainer = Trainer(recipe, "soft", data)
    before = trainer.selector.rows_RH.detach().clone()
    found = [trainer.advance()["soft_loss"] for _ in range(8)]
    assert found[-1] < found[0]
    assert trainer.evaluate()["kl_to_base"] == pytest.approx(0, abs=1e-9)  # no LoRA factor was trained
    trained = trainer.selector.trained()
    assert list(trained) == [ROWS]
    assert not torch.equal(trained[ROWS], before)

    planned = provenance(objective="soft")
    assert build(recipe, trained, data, None, planned, tmp_path / "soft") == planned
    assert read_provenance(tmp_path / "soft") == planned
    saved = load_model(ModelSettings(path=str(tmp_path / "soft"), dtype="float32", device="cpu"))
    rows_RH = saved.get_output_embeddings().weight[list(trainer.selector.reserved_ids)]
    torch.testing.assert_close(rows_RH, trained[ROWS])


def test_an_unknown_objective_is_named(recipe_path: Path) -> None:
    with pytest.raises(UserError, match="no objective 'kdd'; there are: selector, kd, tah"):
        objective("kdd", load_recipe(recipe_path).distil)


ALONE = """
import sys
for name in ("ray", "pyarrow", "mlflow", "pipelines", "serving"):
    sys.modules[name] = None  # importing it fails
from s2t_models.recipe import load_recipe
from s2t_models.training.batches import trajectories
from s2t_models.training.build import build
from s2t_models.training.router import train_router
from s2t_models.training.trainer import Trainer
step = dict(step=1, by_kl=True, candidates_K=[5, 6], slm_logprobs_K=[-1.0, -1.0], teacher_logprobs_K=[-0.1, -3.0])
rows = [
    dict(
        uid=str(n), prompt=str(n), prompt_ids=[n, 3], output_ids=[5, 7, 9],
        kl_T=[0, 1, 0], entropy_T=[0] * 3, teacher_argmax_T=[5, 6, 9], kept=[step],
    )
    for n in range(1, 5)
]
recipe = load_recipe(sys.argv[1], ["distil.batch=2", "distil.validation=0.25"])
trainer = Trainer(recipe, "selector", trajectories(rows))
print(trainer.advance()["loss"] > 0)
"""


def test_training_needs_no_ray_arrow_or_mlflow(recipe_path: Path) -> None:
    command = [sys.executable, "-c", ALONE, str(recipe_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe_path.parents[2])
    assert done.stdout == "True\n", done.stderr
