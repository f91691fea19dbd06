"""Training of R2R's router: steps with 0/1 labels (see `policies.r2r_labels`) to a router with its threshold.

Axes: _T step, _F feature.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from s2t_models.router import Router, RouterConfig
from s2t_models.training_settings import RouterSettings


def train_router(
    inputs_TF: np.ndarray,
    labels_T: np.ndarray,
    sizes: RouterConfig,
    settings: RouterSettings,
    device: str = "cpu",
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Router:
    """Train on steps [T, F] with 0/1 labels [T]; returns the router of the epoch with the lowest validation loss, on
    `device`, its threshold set to reach `settings.recall` on the validation steps.

    `report` gets each epoch's figures. The steps stay on the CPU but for the batch at hand. Raises ValueError where the
    training steps lack one of the two labels, or no validation step is divergent.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(labels_T), generator=generator)
    held_out = max(1, int(len(order) * settings.validation))
    inputs, labels = torch.from_numpy(inputs_TF).float(), torch.from_numpy(labels_T).float()
    check, train = order[:held_out], order[held_out:]
    positives = float(labels[train].sum())
    if not 0 < positives < len(train):
        raise ValueError(
            f"router: {positives:.0f} of {len(train)} training steps are divergent; both kinds are needed, "
            "label more prompts"
        )
    if not labels[check].any():
        raise ValueError(f"router: none of {held_out} validation steps is divergent; label more prompts")
    weight = torch.tensor((len(train) - positives) / positives, device=device)

    def loss_sum(batch: torch.Tensor) -> torch.Tensor:
        logits = router(inputs[batch].to(device))
        return F.binary_cross_entropy_with_logits(logits, labels[batch].to(device), pos_weight=weight, reduction="sum")

    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        router = Router(sizes).to(device)
        optimizer = torch.optim.AdamW(
            router.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        lowest, best, waited = float("inf"), copy.deepcopy(router.state_dict()), 0
        for epoch in range(settings.epochs):
            router.train()
            for batch in train[torch.randperm(len(train), generator=generator)].split(settings.batch):
                loss = loss_sum(batch) / len(batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            router.eval()
            with torch.no_grad():
                check_loss = sum(loss_sum(batch).item() for batch in check.split(settings.batch)) / len(check)
            report({"epoch": epoch, "train_loss": loss.item(), "validation_loss": check_loss})
            waited += 1
            if check_loss < lowest:
                lowest, best, waited = check_loss, copy.deepcopy(router.state_dict()), 0
            if waited >= settings.patience:
                break
    router.load_state_dict(best)
    threshold = recall_threshold(
        np.concatenate([router.probabilities(inputs[batch].numpy()) for batch in check.split(settings.batch)]),
        labels_T[check.numpy()],
        settings.recall,
    )
    router.settings = replace(sizes, threshold=threshold)
    return router.eval()


def recall_threshold(probabilities_T: np.ndarray, labels_T: np.ndarray, recall: float) -> float:
    """The highest threshold, that is the lowest positive rate, at which `p >= threshold` still finds `recall` of the
    positives, of which there is one at least."""
    positives = np.sort(probabilities_T[labels_T.astype(bool)])
    return float(positives[int(np.floor((1 - recall) * len(positives) + 1e-9))])
