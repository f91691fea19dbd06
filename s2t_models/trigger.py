"""The trigger head: says from the SLM's last hidden state whether a step is a divergence point (appendix E).

It is trained on the hidden states (after the last norm) of the model that will be served. Its threshold is set afterwards,
as the percentile for the wanted budget. The module knows nothing of how hidden states or labels came about.

Axes: _M sample (a step of any trajectory), _H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from s2t_models import recipe

BATCH = 4096
#: The budgets tau that thresholds are set for.
BUDGETS = (0.01, 0.02, 0.05, 0.10, 0.20)


class TriggerHead(nn.Module):
    """A two-layer MLP with ReLU and dropout: [..., H] -> logit [...] (E.2)."""

    def __init__(self, hidden_size: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, hidden)
        self.dropout = dropout
        self.second = nn.Linear(hidden, 1)

    def forward(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        # Functions, not modules: at a batch of one, calling a module costs as much as what it computes, at every step.
        activations = F.linear(hidden_MH.to(self.first.weight.dtype), self.first.weight, self.first.bias).relu_()
        if self.training:
            activations = F.dropout(activations, self.dropout)
        return F.linear(activations, self.second.weight, self.second.bias).squeeze(-1)


def train(
    hidden_MH: torch.Tensor, positive_M: torch.Tensor, trajectory_M: torch.Tensor, settings: recipe.TriggerHead
) -> tuple[TriggerHead, dict[str, float]]:
    """Train a head with BCE and positive weight (negatives / positives), AdamW, the best epoch by validation AUC.

    `positive_M` is bool; `trajectory_M` numbers each sample's trajectory: the held-out share is one of trajectories, so that
    neighbouring steps never sit on both sides. Returns the head in eval mode and its figures (`auc`, `accuracy`, `epoch`).
    Raises ValueError where either side of the split has only one kind of label.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    trajectories = trajectory_M.unique()
    order = torch.randperm(len(trajectories), generator=generator)
    held_out = trajectories[order[: max(1, round(settings.validation * len(trajectories)))]]
    is_held_out_M = torch.isin(trajectory_M, held_out)
    train_MH, train_M = hidden_MH[~is_held_out_M].float(), positive_M[~is_held_out_M].float()
    check_MH, check_M = hidden_MH[is_held_out_M].float(), positive_M[is_held_out_M]
    for name, labels_M in (("training", train_M), ("validation", check_M)):
        if len(labels_M.unique()) < 2:
            raise ValueError(
                f"trigger head: the {name} steps hold no positive or no negative one; give more trajectories"
            )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = TriggerHead(hidden_MH.shape[-1], settings.hidden, settings.dropout).to(hidden_MH.device)
        weight = (len(train_M) - train_M.sum()) / train_M.sum()
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate)
        best: tuple[float, float, int, dict[str, torch.Tensor]] | None = None
        for epoch in range(settings.epochs):
            head.train()
            shuffled_M = torch.randperm(len(train_M), generator=generator).to(train_M.device)
            for piece in shuffled_M.split(BATCH):
                loss = F.binary_cross_entropy_with_logits(head(train_MH[piece]), train_M[piece], pos_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            head.eval()
            with torch.no_grad():
                logits_M = head(check_MH)
            area = auc(logits_M.cpu().numpy(), check_M.cpu().numpy())
            if best is None or area > best[0]:
                accuracy = ((logits_M >= 0) == check_M).float().mean().item()
                best = (area, accuracy, epoch, copy.deepcopy(head.state_dict()))
    assert best is not None  # epochs >= 1
    head.load_state_dict(best[3])
    return head.eval(), {"auc": best[0], "accuracy": best[1], "epoch": float(best[2])}


def calibrate(values: Iterable[float] | np.ndarray, budgets: Iterable[float]) -> dict[float, float]:
    """The threshold of each budget tau: a step triggers when its value >= threshold (E.2, dynamic thresholding).

    The threshold is the value of rank round(tau * M), at least 1, from the top. Steps that tie with it all trigger, so the
    share that does is never below tau (but for the rounding) and above it only by ties.
    """
    descending_M = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    if not len(descending_M):
        raise ValueError("calibration needs at least one step")
    return {tau: float(descending_M[max(round(tau * len(descending_M)), 1) - 1]) for tau in budgets}


def auc(values_M: np.ndarray, positive_M: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive step outranks a negative one, ties counting half."""
    _, inverse_M, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    rank_M = (counts.cumsum() - (counts - 1) / 2)[inverse_M]
    positives = int(positive_M.sum())
    negatives = len(positive_M) - positives
    return float((rank_M[positive_M].sum() - positives * (positives + 1) / 2) / (positives * negatives))
