"""The control: the selector's labels spent on plain token-level distillation. Its product is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from s2t_models.training import losses
from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.objectives.base import Objective, Outputs, Term


class KdObjective(Objective):
    """Cross-entropy of the teacher's best candidate at labelled states + `kd_beta` x KL to the base at all others."""

    def count(self, items: Sequence[Trajectory]) -> dict[str, int]:
        counts = super().count(items)
        return counts | {"unlabelled": counts["states"] - counts["groups"]}

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        answer, stability = losses.distillation(
            outputs.base_SV, outputs.tuned_SV, batch.packed.state_G, batch.target_token_G
        )
        return [
            Term("kd_loss", answer, 1.0, per="groups"),
            Term("kl_loss", stability, self.settings.kd_beta, per="unlabelled"),
        ]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        text_GV = outputs.tuned_SV[batch.packed.state_G]
        return text_GV.gather(1, batch.candidates_GK.clamp(min=0)), text_GV.argmax(-1)
