"""From the best trained state to what is served: merge, train the trigger head on the merged model, set thresholds, save.

Axes: _M step of any trajectory, _T step, _H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from s2t_models import artifact, trigger
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import Recipe
from s2t_models.reserved import bins
from s2t_models.training.batches import Trajectory, collate, split_by_prompt
from s2t_models.training.trainer import Objective, load_selector

#: Trajectories in one forward when hidden states are read.
BATCH = 16


def build(
    recipe: Recipe,
    objective: Objective,
    trained: dict[str, torch.Tensor],
    data: Sequence[Trajectory],
    calibration: Sequence[Trajectory] | None,
    provenance: dict[str, Any],
    output: Path,
) -> dict[str, float]:
    """Write the artifact (`selector`) or the plain merged checkpoint (`kd`) to `output`; returns the trigger head's figures.

    The head is trained on the training prompts' trajectories, labelled by the top `positives` share of their steps by KL;
    thresholds are percentiles over `calibration`, or over the held-out prompts' trajectories where there is none.
    """
    selector = load_selector(recipe)
    selector.rows_RH.requires_grad_(objective == "selector")
    selector.load_trained(trained)
    reserved = selector.reserved_ids
    model = selector.merge().eval()
    tokenizer = load_tokenizer(recipe.slm)
    if objective == "kd":
        artifact.save_checkpoint(output, model, tokenizer, provenance)
        return {}
    training, held_out = split_by_prompt(data, recipe.distil.validation, recipe.seed)
    hidden_MH, trajectory_M = hidden_states(model, training)
    kl_M = np.concatenate([item.kl_T for item in training])
    share = recipe.trigger_head.positives
    positive_M = torch.from_numpy(kl_M >= trigger.calibrate(kl_M, [share])[share]).to(hidden_MH.device)
    head, figures = trigger.train(hidden_MH, positive_M, trajectory_M.to(hidden_MH.device), recipe.trigger_head)
    steps = held_out if calibration is None else calibration
    with torch.no_grad():
        logits_M = head(hidden_states(model, steps)[0]).cpu().numpy()
    values = {
        "head": logits_M,
        "kl": np.concatenate([item.kl_T for item in steps]),
        "entropy": np.concatenate([item.entropy_T for item in steps]),
    }
    budgets = sorted({*trigger.BUDGETS, recipe.budget})
    card = artifact.Card(
        reserved_ids=reserved,
        bins=tuple(bins(len(reserved)).tolist()),
        temperature=recipe.distil.temperature,
        prior_weight=recipe.policies.local.prior_weight,
        trained_prior_weight=recipe.distil.prior_weight,
        thresholds={
            name: {str(tau): threshold for tau, threshold in trigger.calibrate(values_M, budgets).items()}
            for name, values_M in values.items()
        },
        provenance=provenance | {"trigger_head": figures, "calibration_steps": len(logits_M)},
    )
    artifact.save(output, model, tokenizer, head, card)
    return {f"trigger/{name}": value for name, value in figures.items()}


@torch.no_grad()
def hidden_states(model: PreTrainedModel, items: Sequence[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state after the last norm at each output step, [M, H], and its trajectory's number, [M]; in order."""
    by_length = sorted(range(len(items)), key=lambda i: len(items[i].tree.tokens))
    states: dict[int, torch.Tensor] = {}
    for start in range(0, len(items), BATCH):
        numbers = by_length[start : start + BATCH]
        packed = collate([items[i] for i in numbers], model.device, leaves=False).packed
        hidden_BLH = model.get_decoder()(**packed.inputs(), use_cache=False).last_hidden_state
        pieces = packed.states(hidden_BLH).split([len(items[i].kl_T) for i in numbers])
        states.update(zip(numbers, pieces, strict=True))
    trajectory_M = torch.repeat_interleave(torch.tensor([len(states[i]) for i in range(len(items))]))
    return torch.cat([states[i] for i in range(len(items))]), trajectory_M
