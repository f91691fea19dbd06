"""The control: the selector's labels spent on plain token-level distillation. Its product is an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.objectives.base import Objective, Outputs, Term


class KdObjective(Objective):
    """Cross-entropy of the teacher's best candidate at labelled states + `kd_beta` x KL to the base at all others."""

    def count(self, items: Sequence[Trajectory]) -> dict[str, int]:
        counts = super().count(items)
        return counts | {"unlabelled": counts["states"] - counts["groups"]}

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        state_G = batch.packed.state_G
        surprisal_G = outputs.surprisal(state_G, batch.target_token_G)
        drift_S = outputs.drift()
        unlabelled_S = torch.ones_like(drift_S, dtype=torch.bool).index_fill(0, state_G, False)
        return [
            Term("kd_loss", surprisal_G.sum() / max(len(state_G), 1), 1.0, per="groups"),
            Term(
                "kl_loss",
                drift_S[unlabelled_S].sum() / unlabelled_S.sum().clamp(min=1),
                self.settings.kd_beta,
                per="unlabelled",
            ),
        ]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.text_choice(batch.packed.state_G, batch.candidates_GK)
