"""DistilQwen2.5's way (Wang et al., 2025): first the teacher's texts, then beside them its best tokens at every step.

The collection is the teacher's own (`s2t collect --teacher`). The product is an ordinary checkpoint.

Axes: _S decoding state, _V vocabulary, _N the teacher's top N.
"""

from __future__ import annotations

import torch

from s2t_models.divergence import divergence
from s2t_models.training.batches import NO_CANDIDATE, Batch, Trajectory
from s2t_models.training.objectives.base import Objective, Outputs, Term


class TwoStageObjective(Objective):
    """Cross-entropy of the teacher's texts; in the second stage (1 - `kl`) of it + `kl` x forward KL."""

    needs_base = False
    writer = "teacher"

    @property
    def learning_rate(self) -> float:
        return self.settings.two_stage.learning_rate

    @property
    def warmup(self) -> float:
        return self.settings.two_stage.warmup

    def labelled(self, item: Trajectory) -> Trajectory:
        return item

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        settings, packed = self.settings.two_stage, batch.packed
        every_S = torch.arange(len(outputs.tuned_SH), device=outputs.tuned_SH.device)
        surprisal = outputs.surprisal(every_S, packed.written_S).mean()
        if outputs.progress < settings.supervised:
            return [Term("ce_loss", surprisal, 1.0, per="states")]
        ids_GN = batch.candidates_GK[:, : settings.top]
        teacher_GN = batch.teacher_logprobs_GK[:, : settings.top]
        kl_G = outputs.at(packed.state_G, forward_kl, ids_GN, teacher_GN)
        return [
            Term("ce_loss", surprisal, 1.0 - settings.kl, per="states"),
            Term("forward_kl_loss", kl_G.sum() / max(len(kl_G), 1), settings.kl, per="groups"),
        ]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.text_choice(batch.packed.state_G, batch.candidates_GK)


def forward_kl(text_SV: torch.Tensor, ids_SN: torch.Tensor, teacher_logprobs_SN: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of each state, [S], on the teacher's top N tokens (-1: none) and one bucket for the
    rest."""
    student_SN = text_SV.log_softmax(-1).gather(1, ids_SN.clamp(min=0))
    return divergence(teacher_logprobs_SN, student_SN.masked_fill(ids_SN < 0, NO_CANDIDATE))
