"""How often, and how surely, a trained model decides as the teacher does on held-out prompts.

Axes: _S decoding state, _G group, _K candidate, _V text vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from s2t_models.training import losses
from s2t_models.training.batches import Batch
from s2t_models.training.objectives.base import Outputs

Checkpoint = TypeVar("Checkpoint")

#: The names of the sums, in the order in which workers add them up; a worker without a batch adds zeros.
SUMS = (
    *("top_steps", "random_steps", "steps", "ranked_steps", "agree", "agree_random", "agree_slm"),
    *("selection", "spearman", "kl"),
)


def add_up(
    batch: Batch, outputs: Outputs, preference_GK: torch.Tensor, token_G: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The sums over one batch that `figures` are made from; `preference_GK` and `token_G` are what `Objective.choose`
    gave."""
    top_G, target_G, valid_GK = batch.by_kl_G, batch.target_G, batch.valid_GK
    agrees_G = token_G == batch.target_token_G
    best_G1 = outputs.prior(batch.packed.state_G, batch.candidates_GK).argmax(-1, keepdim=True)
    slm_token_G = batch.candidates_GK.gather(1, best_G1)[:, 0]
    several_G = valid_GK.sum(-1) > 1
    return {
        "top_steps": top_G.sum(),
        "random_steps": (~top_G).sum(),
        "steps": torch.tensor(len(outputs.tuned_SH)),
        "ranked_steps": several_G.sum(),
        "agree": (agrees_G & top_G).sum(),
        "agree_random": (agrees_G & ~top_G).sum(),
        "agree_slm": ((slm_token_G == batch.target_token_G) & top_G).sum(),
        "selection": losses.selection(preference_GK[top_G], target_G[top_G], valid_GK[top_G]) * top_G.sum(),
        "spearman": spearman(preference_GK, batch.teacher_logprobs_GK, valid_GK)[several_G].sum(),
        "kl": outputs.drift().sum(),
    }


def figures(sums: dict[str, float]) -> dict[str, float]:
    """Means from the sums over all batches.

    `agree_at_1`: how often the choice is the teacher's, on the `top_steps` steps kept by KL; `selection_loss` the
    cross-entropy of that choice among the candidates (Eq. 7), mean over them; `agree_at_1_random` on the random ones;
    `agree_at_1_slm` for the frozen base's ranking on the top steps; `spearman` between preferences and the teacher's
    log-probabilities, mean over all groups of several candidates; `kl_to_base` in nats, mean over steps.
    """
    top = max(sums["top_steps"], 1)
    return {
        "top_steps": sums["top_steps"],
        "agree_at_1": sums["agree"] / top,
        "selection_loss": sums["selection"] / top,
        "agree_at_1_random": sums["agree_random"] / max(sums["random_steps"], 1),
        "agree_at_1_slm": sums["agree_slm"] / top,
        "spearman": sums["spearman"] / max(sums["ranked_steps"], 1),
        "kl_to_base": sums["kl"] / max(sums["steps"], 1),
    }


def latest_of_the_best(
    checkpoints: Sequence[tuple[Checkpoint, Mapping[str, Any]]],
) -> tuple[Checkpoint, Mapping[str, Any]]:
    """Of checkpoints with their `figures` and `step`, the latest whose Agree@1 is within one standard error of the
    highest: a difference that the held-out steps are too few to tell is no reason to leave a training early."""
    highest = max(metrics["agree_at_1"] for _, metrics in checkpoints)
    steps = max(metrics["top_steps"] for _, metrics in checkpoints)
    enough = highest - math.sqrt(highest * (1 - highest) / max(steps, 1))
    return max((pair for pair in checkpoints if pair[1]["agree_at_1"] >= enough), key=lambda pair: pair[1]["step"])


def spearman(left_GK: torch.Tensor, right_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of each group's real candidates, [G]; nan where there is only one."""

    def centred_ranks(values_GK: torch.Tensor) -> torch.Tensor:
        lowest = values_GK.double().masked_fill(~valid_GK, -math.inf)
        rank_GK = lowest.argsort(-1).argsort(-1).double() * valid_GK
        return (rank_GK - rank_GK.sum(-1, keepdim=True) / valid_GK.sum(-1, keepdim=True)) * valid_GK

    left, right = centred_ranks(left_GK), centred_ranks(right_GK)
    return (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()
