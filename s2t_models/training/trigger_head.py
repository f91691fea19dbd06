"""Training of the trigger head (appendix E). It knows nothing of how hidden states or labels came about.

Axes: _M step of any trajectory, _H hidden.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F

from s2t_models.training_settings import TriggerHeadSettings
from s2t_models.trigger import TriggerHead

BATCH = 4096


def train_head(
    hidden_MH: torch.Tensor,
    positive_M: torch.Tensor,
    trajectory_M: torch.Tensor,
    settings: TriggerHeadSettings,
) -> tuple[TriggerHead, dict[str, float]]:
    """Train a head with BCE and positive weight (negatives / positives), AdamW, the best epoch by validation AUC.

    `positive_M` is bool; `trajectory_M` numbers each sample's trajectory: the held-out share is one of trajectories, so
    that neighbouring steps never sit on both sides. Returns the head in eval mode and its figures (`auc`, `accuracy`,
    `epoch`). The states are not copied, which is most of what this takes. Raises ValueError where either side of the
    split has only one kind of label.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    trajectories = trajectory_M.unique()
    order = torch.randperm(len(trajectories), generator=generator)
    held_out = trajectories[order[: max(1, round(settings.validation * len(trajectories)))]]
    is_held_out_M = torch.isin(trajectory_M, held_out)
    # Places among all steps, of those that are trained on and those that are held out.
    train, check = ((~is_held_out_M).nonzero().squeeze(1), is_held_out_M.nonzero().squeeze(1))
    train_M, check_M = positive_M[train].float(), positive_M[check]
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
                logits_M = head(hidden_MH[train[piece]])
                loss = F.binary_cross_entropy_with_logits(logits_M, train_M[piece], pos_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            head.eval()
            with torch.no_grad():
                logits_M = torch.cat([head(hidden_MH[piece]) for piece in check.split(BATCH)])
            area = auc(logits_M.cpu().numpy(), check_M.cpu().numpy())
            if best is None or area > best[0]:
                accuracy = ((logits_M >= 0) == check_M).float().mean().item()
                best = (area, accuracy, epoch, copy.deepcopy(head.state_dict()))
    assert best is not None  # epochs >= 1
    head.load_state_dict(best[3])
    return head.eval(), {"auc": best[0], "accuracy": best[1], "epoch": float(best[2])}


def auc(values_M: np.ndarray, positive_M: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive step outranks a negative one, ties counting half."""
    _, inverse_M, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    rank_M = (counts.cumsum() - (counts - 1) / 2)[inverse_M]
    positives = int(positive_M.sum())
    negatives = len(positive_M) - positives
    return float((rank_M[positive_M].sum() - positives * (positives + 1) / 2) / (positives * negatives))
