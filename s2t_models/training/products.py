"""What a training leaves behind: a plain checkpoint, or an artifact with a trigger head trained on the merged model.

Axes: _M step of any trajectory, _L packed token, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from s2t_models import artifact
from s2t_models.calibration import BUDGETS, calibrate
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from s2t_models.training.batches import Selected, Trajectory, collate, pieces
from s2t_models.training.tree_attention import decode, use_tree_attention
from s2t_models.training.trigger_head import train_head

#: Hears what share of a product's making is done, and figures of what is trained for it.
Report = Callable[[float, dict[str, float]], None]


@dataclass(frozen=True)
class Merged:
    """The trained model as plain transformers knows it, or the frozen base where the objective keeps its LoRA apart,
    with what products are made from: the trajectories trained on, and others to set thresholds on. `ranking_head`
    [R, H] is there where no rows are reserved (D.1). What takes long says how far it is to `report`."""

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
    report: Report = lambda share, figures: None


def save_checkpoint(merged: Merged, output: Location) -> Provenance:
    """Write the model as an ordinary checkpoint; returns its provenance."""
    artifact.save_checkpoint(output, merged.model, merged.tokenizer, merged.provenance)
    return merged.provenance


def save_artifact(merged: Merged, output: Location) -> Provenance:
    """Train the trigger head, set thresholds, write the artifact; returns its provenance with the head's figures.

    The head's positives are the top `trigger_head.positives` share of the training trajectories' steps by KL;
    thresholds are percentiles over the calibration trajectories.
    """
    recipe, model, settings = merged.recipe, merged.model, merged.recipe.trigger_head
    training = drawn(merged.training, settings.most_steps, settings.seed)
    hidden_MH = over_steps(model, training, recipe.distil.micro_batch)
    kl_M = np.concatenate([item.kl_T for item in training])
    positive_M = torch.from_numpy(kl_M >= calibrate(kl_M, [settings.positives])[settings.positives])
    trajectory_M = torch.repeat_interleave(torch.tensor([len(item.kl_T) for item in training]))
    device = hidden_MH.device
    head, figures = train_head(hidden_MH, positive_M.to(device), trajectory_M.to(device), settings)
    logits_M = over_steps(model, merged.calibration, recipe.distil.micro_batch, head).cpu().numpy()
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


def drawn(items: Sequence[Trajectory], most: int, seed: int) -> Sequence[Trajectory]:
    """The trajectories themselves, or where they have more than `most` steps, some of them that have no more: drawn
    with the seed, in their order. Two at the least."""
    steps = np.array([len(item.kl_T) for item in items])
    if steps.sum() <= most:
        return items
    order = np.random.default_rng(seed).permutation(len(items))
    count = max(int(np.searchsorted(steps[order].cumsum(), most, side="right")), 2)
    return Selected(items, sorted(order[:count].tolist()))


@torch.no_grad()
def over_steps(
    model: PreTrainedModel,
    items: Sequence[Trajectory],
    micro_batch: int,
    of: Callable[[torch.Tensor], torch.Tensor] = lambda hidden_MH: hidden_MH,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """`of` the hidden state after the last norm at each output step, [M, ...]; in order. By itself, [M, H]. With
    `layers`, those after each of these (0: the embeddings) come before it, laid end to end.

    `micro_batch` tokens go through the model at once, and nothing but what is returned is kept."""
    use_tree_attention(model)
    steps = [len(item.kl_T) for item in items]
    begins = np.cumsum([0, *steps])
    by_length = sorted(range(len(items)), key=lambda i: len(items[i].tree.tokens))
    found: torch.Tensor | None = None
    for piece in pieces([len(items[i].tree.tokens) for i in by_length], micro_batch):
        numbers = by_length[piece]
        packed = collate([items[i] for i in numbers], model.device, leaves=False).packed
        values = of(packed.states(decode(model, **packed.inputs(), layers=layers)))
        if found is None:
            found = values.new_empty(int(begins[-1]), *values.shape[1:])
        for number, part in zip(numbers, values.split([steps[i] for i in numbers]), strict=True):
            found[begins[number] : begins[number + 1]] = part
    if found is None:
        raise ValueError("there are no trajectories")
    return found
