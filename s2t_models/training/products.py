"""What a training leaves behind: a plain checkpoint, or an artifact with a trigger head trained on the merged model.

Axes: _M step of any trajectory, _L packed token, _H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2t_models import artifact
from s2t_models.calibration import BUDGETS, calibrate
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from s2t_models.training.batches import Trajectory, collate, pieces
from s2t_models.training.tree_attention import decode, use_tree_attention
from s2t_models.training.trigger_head import train_head


@dataclass(frozen=True)
class Merged:
    """The trained model as plain transformers knows it, or the frozen base where the objective keeps its LoRA apart,
    with what products are made from: the trajectories trained on, and others to set thresholds on. `ranking_head`
    [R, H] is there where no rows are reserved (D.1)."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reserved_ids: tuple[int, ...]
    bins: tuple[float, ...]
    ranking_head: torch.Tensor | None
    adapter: artifact.Adapter
    training: Sequence[Trajectory]
    calibration: Sequence[Trajectory]
    provenance: Provenance


def save_checkpoint(merged: Merged, output: Location) -> Provenance:
    """Write the model as an ordinary checkpoint; returns its provenance."""
    artifact.save_checkpoint(output, merged.model, merged.tokenizer, merged.provenance)
    return merged.provenance


def save_artifact(merged: Merged, output: Location) -> Provenance:
    """Train the trigger head, set thresholds, write the artifact; returns its provenance with the head's figures.

    The head's positives are the top `trigger_head.positives` share of the training trajectories' steps by KL;
    thresholds are percentiles over the calibration trajectories.
    """
    recipe, model = merged.recipe, merged.model
    hidden_MH, trajectory_M = hidden_states(model, merged.training, recipe.distil.micro_batch)
    kl_M = np.concatenate([item.kl_T for item in merged.training])
    share = recipe.trigger_head.positives
    positive_M = torch.from_numpy(kl_M >= calibrate(kl_M, [share])[share]).to(hidden_MH.device)
    head, figures = train_head(hidden_MH, positive_M, trajectory_M, recipe.trigger_head)
    with torch.no_grad():
        calibration_MH, _ = hidden_states(model, merged.calibration, recipe.distil.micro_batch)
        logits_M = head(calibration_MH).cpu().numpy()
    values = {
        "head": logits_M,
        "kl": np.concatenate([item.kl_T for item in merged.calibration]),
        "entropy": np.concatenate([item.entropy_T for item in merged.calibration]),
    }
    budgets = sorted({*BUDGETS, recipe.budget})
    card = artifact.Card(
        reserved_ids=merged.reserved_ids,
        bins=merged.bins,
        temperature=recipe.distil.temperature,
        prior_weight=recipe.policies.local.prior_weight,
        trained_prior_weight=recipe.distil.prior_weight,
        thresholds={name: calibrate(values_M, budgets) for name, values_M in values.items()},
        provenance=merged.provenance.model_copy(update={"trigger_head": figures, "calibration_steps": len(logits_M)}),
    )
    artifact.save(output, model, merged.tokenizer, head, card, merged.ranking_head, merged.adapter)
    return card.provenance


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, items: Sequence[Trajectory], micro_batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state after the last norm at each output step, [M, H], and its trajectory's number, [M]; in order.
    `micro_batch` tokens go through the model at once."""
    use_tree_attention(model)
    by_length = sorted(range(len(items)), key=lambda i: len(items[i].tree.tokens))
    states: dict[int, torch.Tensor] = {}
    for piece in pieces([len(items[i].tree.tokens) for i in by_length], micro_batch):
        numbers = by_length[piece]
        packed = collate([items[i] for i in numbers], model.device, leaves=False).packed
        hidden_BLH = decode(model, **packed.inputs())
        parts = packed.states(hidden_BLH).split([len(items[i].kl_T) for i in numbers])
        states.update(zip(numbers, parts, strict=True))
    trajectory_M = torch.repeat_interleave(torch.tensor([len(states[i]) for i in range(len(items))]))
    return torch.cat([states[i] for i in range(len(items))]), trajectory_M.to(model.device)
