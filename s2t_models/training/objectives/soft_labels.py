"""An ablation of the selector (D.4, attempt II): the teacher's probabilities of the candidates are learnt, not its
best one."""

from __future__ import annotations

from s2t_models.training import losses
from s2t_models.training.batches import Batch
from s2t_models.training.objectives.base import Outputs, Term
from s2t_models.training.objectives.selector import SelectorObjective


class SoftLabelsObjective(SelectorObjective):
    """KL(teacher || preferences) over the candidates + `beta` x KL to the base."""

    def ranking(self, batch: Batch, outputs: Outputs) -> list[Term]:
        loss_G = losses.soft_labels(self.preference(batch, outputs), batch.teacher_logprobs_GK, batch.valid_GK)
        return [Term("soft_loss", loss_G.sum() / max(len(loss_G), 1), 1.0, per="groups")]
