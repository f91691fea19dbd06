"""An ablation of the selector (D.4, attempt I): each candidate by itself is classified as right or wrong."""

from __future__ import annotations

from collections.abc import Sequence

from s2t_models.training import losses
from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.objectives.base import Outputs, Term
from s2t_models.training.objectives.selector import SelectorObjective


class PointwiseObjective(SelectorObjective):
    """Binary cross-entropy of each score + `beta` x KL to the base."""

    def count(self, items: Sequence[Trajectory]) -> dict[str, int]:
        return super().count(items) | {"candidates": sum(int((item.tree.candidates_GK >= 0).sum()) for item in items)}

    def ranking(self, batch: Batch, outputs: Outputs) -> list[Term]:
        loss = losses.pointwise(outputs.scores_GK, batch.target_G, batch.valid_GK)
        return [Term("pointwise_loss", loss, 1.0, per="candidates")]
