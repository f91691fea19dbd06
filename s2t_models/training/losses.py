"""The training losses of the selector and of its ablations (D.4), and the drift from the base that they bound.

All take plain tensors and know nothing of models. Groups may have different numbers of candidates: `valid_GK` marks the
real ones. Axes: _G group (a labelled step), _K candidate, _M candidate of any group, _S decoding state,
_V vocabulary (reserved rows never likely).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

#: Whose scores' spread sets the margin of a group: its own, or the whole batch's.
Spread = Literal["group", "batch"]
EXCLUDED = torch.finfo(torch.float32).min


def preference(
    scores_GK: torch.Tensor, prior_GK: torch.Tensor, temperature: float, prior_weight: float
) -> torch.Tensor:
    """What the selector maximises over candidates: score / T + w log p_SLM(c), [G, K]; `prior_GK` are the
    log-probabilities. w = 0 is the paper's rule."""
    return scores_GK / temperature + prior_weight * prior_GK


def teacher_choice(teacher_logprobs_GK: torch.Tensor, valid_GK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's best candidate c* of each group, [G], and its margin, [G]: p(best) - p(second best), as the teacher
    gives them (a group of one candidate has margin p(best))."""
    probabilities_GK = teacher_logprobs_GK.exp().masked_fill(~valid_GK, 0.0)
    if probabilities_GK.shape[1] == 1:
        return probabilities_GK.argmax(-1), probabilities_GK[:, 0]
    best_G2 = probabilities_GK.topk(2, dim=-1)
    return best_G2.indices[:, 0], best_G2.values[:, 0] - best_G2.values[:, 1]


def selection(preference_GK: torch.Tensor, target_G: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the teacher's best candidate over the set, mean over groups (Eq. 7); 0 where there is no
    group."""
    logits_GK = preference_GK.masked_fill(~valid_GK, EXCLUDED)
    return F.cross_entropy(logits_GK, target_G, reduction="sum") / max(len(target_G), 1)


def margin(
    preference_GK: torch.Tensor,
    scores_GK: torch.Tensor,
    target_G: torch.Tensor,
    valid_GK: torch.Tensor,
    temperature: float,
    spread: Spread = "group",
) -> torch.Tensor:
    """Adaptive pairwise hinge against the hard negative, mean over groups (Eqs. 13, 14); 0 where there is no group.

    max(0, m - (preference(c*) - preference(c-))), where c- is the best wrong candidate and the effective margin m =
    std(scores) / T follows the spread of the scores (see `score_spread`; a constant to the gradient), so that flat
    scores are not over-penalised. A group of one candidate costs nothing.
    """
    right_G = preference_GK.gather(1, target_G[:, None])[:, 0]
    is_wrong_GK = valid_GK.scatter(1, target_G[:, None], False)
    hardest_G = preference_GK.masked_fill(~is_wrong_GK, EXCLUDED).amax(-1)
    hinge_G = (score_spread(scores_GK, valid_GK, spread) / temperature - (right_G - hardest_G)).relu()
    return hinge_G.masked_fill(valid_GK.sum(-1) < 2, 0.0).sum() / max(len(target_G), 1)


def score_spread(scores_GK: torch.Tensor, valid_GK: torch.Tensor, spread: Spread) -> torch.Tensor:
    """The population standard deviation of the real candidates' scores, without gradient, for each group, [G]: of the
    group's own scores ("group"), or of all that are given ("batch"), as the paper has it."""
    scores_GK = scores_GK.detach().masked_fill(~valid_GK, 0.0)
    if spread == "batch":
        scores_M = scores_GK[valid_GK]
        return (scores_M - scores_M.mean()).square().mean().sqrt().expand(len(scores_GK))
    count_G1 = valid_GK.sum(-1, keepdim=True)
    mean_G1 = scores_GK.sum(-1, keepdim=True) / count_G1
    variance_G = ((scores_GK - mean_G1).square() * valid_GK).sum(-1) / count_G1[:, 0]
    return variance_G.sqrt()


def pointwise(scores_GK: torch.Tensor, target_G: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each candidate's score as the probability that it is the teacher's best, mean over all
    real candidates (D.4, attempt I); 0 where there is none."""
    right_GK = torch.zeros_like(scores_GK).scatter(1, target_G[:, None], 1.0)
    loss_GK = F.binary_cross_entropy(scores_GK, right_GK, reduction="none")
    return loss_GK.masked_fill(~valid_GK, 0.0).sum() / valid_GK.sum().clamp(min=1)


def list_mle(logits_GK: torch.Tensor, teacher_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """-log of the Plackett-Luce probability of the teacher's order of the real candidates, its best first, of each
    group, [G] (ListMLE): from the candidates that are left each time the teacher's best of them is drawn, with
    probability softmax(logits). `teacher_GK` is anything that orders them as the teacher does."""
    order_GK = teacher_GK.masked_fill(~valid_GK, EXCLUDED).argsort(dim=-1, descending=True, stable=True)
    logits_GK = logits_GK.masked_fill(~valid_GK, EXCLUDED).gather(1, order_GK)
    left_GK = logits_GK.flip(-1).logcumsumexp(-1).flip(-1)  # of those that are not drawn yet
    return (left_GK - logits_GK).masked_fill(~valid_GK.gather(1, order_GK), 0.0).sum(-1)


def soft_labels(preference_GK: torch.Tensor, teacher_logprobs_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """KL(teacher || softmax of the preferences) over the real candidates of each group, [G] (D.4, attempt II)."""
    teacher_GK = teacher_logprobs_GK.masked_fill(~valid_GK, EXCLUDED).log_softmax(-1)
    own_GK = preference_GK.masked_fill(~valid_GK, EXCLUDED).log_softmax(-1)
    return (teacher_GK.exp() * (teacher_GK - own_GK)).masked_fill(~valid_GK, 0.0).sum(-1)


def stability(base_logits_SV: torch.Tensor, tuned_logits_SV: torch.Tensor) -> torch.Tensor:
    """KL(base || tuned) over the text vocabulary at each state, [S], in nats (Eq. 8)."""
    base_SV = base_logits_SV.log_softmax(-1)
    return (base_SV.exp() * (base_SV - tuned_logits_SV.log_softmax(-1))).sum(-1)
