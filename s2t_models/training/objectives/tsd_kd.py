"""TSD-KD (Kim and Baek, 2026): distillation on the student's own texts, of the tokens that it is unsure of.

The tuned model writes (`training.rollouts`), the teacher reads, and three terms are learnt: the divergence to the
teacher, most where the student is less sure than it; the student's entropy where that is high; and in the opening of
each text the teacher's order of the student's best tokens. The product is an ordinary checkpoint.

Shares are taken of each text by itself, so that a gradient does not depend on how a batch is cut.

Axes: _S decoding state, _V vocabulary, _K the student's best tokens, _H hidden, _U text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from s2t_models.training import losses
from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.objectives.base import Objective, Outputs, Term


class TsdKdObjective(Objective):
    """Weighted JSD to the teacher + `entropy` x the student's entropy + `ranking` x ListMLE of its best tokens."""

    needs_base = False
    on_policy = True

    @property
    def learning_rate(self) -> float:
        return self.settings.tsd_kd.learning_rate

    @property
    def warmup(self) -> float:
        return self.settings.tsd_kd.warmup

    def count(self, items: Sequence[Trajectory]) -> dict[str, int]:
        unsure = sum(share_of(item.steps, self.settings.tsd_kd.entropy_share) for item in items)
        return super().count(items) | {"texts": len(items), "unsure": unsure}

    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        settings, teacher = self.settings.tsd_kd, outputs.teacher
        assert teacher is not None
        every_S = torch.arange(len(outputs.tuned_SH), device=outputs.tuned_SH.device)
        lengths_U = batch.packed.row_S.unique_consecutive(return_counts=True)[1].tolist()
        with torch.no_grad():
            entropy_S = outputs.at(every_S, entropy)
        unsure_S = highest(entropy_S, lengths_U, settings.entropy_share)
        weight_S = opening_weights(entropy_S, lengths_U, settings.opening)
        opening_S = weight_S.nonzero()[:, 0]

        def jsd(text_SV: torch.Tensor, teacher_SH: torch.Tensor) -> torch.Tensor:
            return weighted_jsd(text_SV, teacher.text_logits(teacher_SH), settings.beta)

        def ranking(text_SV: torch.Tensor, teacher_SH: torch.Tensor) -> torch.Tensor:
            return ranking_loss(text_SV, teacher.text_logits(teacher_SH), settings.ranking_k)

        ranking_S = outputs.at(opening_S, ranking, teacher.states_SH[opening_S])
        return [
            Term("jsd_loss", outputs.at(every_S, jsd, teacher.states_SH).mean(), 1.0, per="states"),
            Term("entropy_loss", outputs.at(unsure_S, entropy).mean(), settings.entropy, per="unsure"),
            Term("ranking_loss", (ranking_S * weight_S[opening_S]).sum(), settings.ranking, per="texts"),
        ]

    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        return outputs.text_choice(batch.packed.state_G, batch.candidates_GK)


def entropy(logits_SV: torch.Tensor) -> torch.Tensor:
    """Of each state's distribution, [S], in nats."""
    logprobs_SV = logits_SV.log_softmax(-1)
    return -(logprobs_SV.exp() * logprobs_SV).sum(-1)


def weighted_jsd(student_SV: torch.Tensor, teacher_SV: torch.Tensor, beta: float) -> torch.Tensor:
    """sigmoid(H_student - H_teacher) x the generalised Jensen-Shannon divergence of each state, [S], in nats.

    The divergence is beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student;
    the weight gets no gradient. The teacher's vocabulary may be shorter: rows beyond it are left out."""
    student_SV = student_SV[:, : teacher_SV.shape[1]].log_softmax(-1)
    teacher_SV = teacher_SV.log_softmax(-1)
    mixture_SV = torch.logaddexp(student_SV + math.log(1 - beta), teacher_SV + math.log(beta))
    of_teacher_S = (teacher_SV.exp() * (teacher_SV - mixture_SV)).sum(-1)
    of_student_S = (student_SV.exp() * (student_SV - mixture_SV)).sum(-1)
    weight_S = (entropy(student_SV.detach()) - entropy(teacher_SV)).sigmoid()
    return weight_S * (beta * of_teacher_S + (1 - beta) * of_student_S)


def ranking_loss(student_SV: torch.Tensor, teacher_SV: torch.Tensor, k: int) -> torch.Tensor:
    """ListMLE of the student's k best tokens in the teacher's order, [S]."""
    student_SV = student_SV[:, : teacher_SV.shape[1]]
    student_SK, ids_SK = student_SV.topk(min(k, student_SV.shape[1]), dim=-1)
    return losses.list_mle(student_SK, teacher_SV.gather(1, ids_SK), torch.ones_like(ids_SK, dtype=torch.bool))


def share_of(steps: int, share: float) -> int:
    """How many of a text's steps a share is, one at the least."""
    return max(math.ceil(share * steps - 1e-9), 1)


def highest(entropy_S: torch.Tensor, lengths_U: Sequence[int], share: float) -> torch.Tensor:
    """The states where entropy is highest, a share of each text's; the texts lie end to end."""
    texts, found, start = entropy_S.split(list(lengths_U)), [], 0
    for entropy_T in texts:
        found.append(start + entropy_T.topk(share_of(len(entropy_T), share)).indices.sort().values)
        start += len(entropy_T)
    return torch.cat(found)


def opening_weights(entropy_S: torch.Tensor, lengths_U: Sequence[int], share: float) -> torch.Tensor:
    """Weights of a mean over the opening of each text, and then over the texts, [S]: the steps up to which the entropy
    adds up to less than `share` of the text's. A text that begins with more has none, and counts as 0."""
    weights = []
    for entropy_T in entropy_S.split(list(lengths_U)):
        is_opening_T = entropy_T.cumsum(0) < share * entropy_T.sum()
        weights.append(is_opening_T / is_opening_T.sum().clamp(min=1) / len(lengths_U))
    return torch.cat(weights)
