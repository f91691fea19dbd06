"""DistilQwen2.5's way (Wang et al., 2025): first the teacher's texts, then beside them its best tokens at every step.

The collection is the teacher's own (`s2t collect --teacher`). The product is an ordinary checkpoint.

Axes: _S decoding state, _V vocabulary, _N the teacher's top N.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from s2t_models.settings import Role
from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.objectives.base import Objective, Outputs, Term
from s2t_models.training.selector import NEVER

#: What float32 log-probabilities leave to the rest where there is nothing.
ROUNDING = 1e-6


class TwoStageObjective(Objective):
    """Cross-entropy of the teacher's texts; in the second stage (1 - `kl`) of it + `kl` x forward KL."""

    needs_base = False
    drafter: ClassVar[Role] = "teacher"

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
    """KL(teacher || student) of each state, [S], on the teacher's top N tokens (-1: none) and one bucket for the rest:
    what `divergence` is, with a gradient also where the teacher leaves the rest nothing."""
    ids_SN = torch.where(ids_SN < 0, ids_SN[:, :1], ids_SN)
    whole_S = text_SV.logsumexp(-1)
    student_SN = text_SV.gather(1, ids_SN) - whole_S[:, None]
    student_rest_S = text_SV.scatter(1, ids_SN, NEVER).logsumexp(-1) - whole_S
    teacher_SN = teacher_logprobs_SN.exp()
    rest_S = 1.0 - teacher_SN.sum(-1)
    rest_S = torch.where(rest_S > ROUNDING, rest_S, 0.0)
    inside_S = (teacher_SN * (teacher_logprobs_SN - student_SN)).sum(-1)
    return inside_S + torch.xlogy(rest_S, rest_S) - rest_S * student_rest_S
