"""An ablation of the selector (RQ4.3, D.4): the rows that score are trained alone, the LoRA stays off."""

from __future__ import annotations

from s2t_models.training.batches import Batch
from s2t_models.training.objectives.base import Outputs, Term
from s2t_models.training.objectives.selector import SelectorObjective
from s2t_models.training.selector import ROWS


class HeadOnlyObjective(SelectorObjective):
    """Selection + hinge, without a KL to the base: the text distribution cannot change."""

    def trains(self, parameter: str) -> bool:
        return parameter == ROWS

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        return self.ranking(batch, outputs)
