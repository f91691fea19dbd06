"""Training of Think-at-Hard's decider: from the first pass's states and logits, which tokens are hard.

The steps are read again in every epoch, some trajectories at a time, so none of the many numbers that the decider reads
of each is kept. Axes: _S decoding state, _F feature, _V text vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from s2t_models.output_head import OutputHead
from s2t_models.router import Router, RouterConfig
from s2t_models.second_pass import Card, decider_inputs
from s2t_models.training.batches import Trajectory, collate, pieces
from s2t_models.training.per_state import per_state
from s2t_models.training.products import Merged
from s2t_models.training.selector import NEVER
from s2t_models.training.tree_attention import decode, use_tree_attention
from s2t_models.training.trigger_head import auc

#: As published: how the learning rate rises and falls, and the norm that gradients are clipped to.
WARMUP, LOWEST_RATE, GRADIENT_NORM = 0.03, 0.1, 0.2


@dataclass(frozen=True)
class Steps:
    """Decoding states as the decider reads them, [S, F], and whether they are hard, [S]."""

    inputs_SF: torch.Tensor
    hard_S: torch.Tensor


def train_decider(merged: Merged, card: Card) -> tuple[Router, dict[str, float]]:
    """Train on the trajectories of `merged`, whose model is the frozen base; returns the decider in eval mode, and its
    figures on the calibration trajectories: `hard`, the share of hard steps, `second_passes`, the share that it sends
    through a second pass at the recipe's threshold, `recall`, how many of the hard ones are among them, and `auc`.

    Raises ValueError where the calibration steps are all hard or none is."""
    recipe, settings, model = merged.recipe, merged.recipe.distil.tah, merged.model
    training = merged.training
    use_tree_attention(model)
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = -(-len(training) // settings.batch) * settings.epochs
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        decider = Router(
            RouterConfig(
                model.config.hidden_size,
                card.support,
                settings.width,
                settings.blocks,
                settings.expansion,
                settings.dropout,
                recipe.policies.tah.threshold,
                states=len(card.layers),
            )
        ).to(model.device)
        optimizer = torch.optim.AdamW(
            decider.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, round(WARMUP * batches), batches, min_lr_rate=LOWEST_RATE
        )
        weight = torch.tensor(settings.positive_weight, device=model.device)
        decider.train()
        for _ in range(settings.epochs):
            for batch in torch.randperm(len(training), generator=generator).split(settings.batch):
                items = [training[int(place)] for place in batch]
                total = sum(len(item.kl_T) for item in items)
                optimizer.zero_grad()
                for steps in read(merged, card, items):
                    logits_S = decider(steps.inputs_SF)
                    labels_S = steps.hard_S.float()
                    loss = F.binary_cross_entropy_with_logits(logits_S, labels_S, pos_weight=weight, reduction="sum")
                    (loss / total).backward()
                nn.utils.clip_grad_norm_(decider.parameters(), GRADIENT_NORM)
                optimizer.step()
                schedule.step()
    return decider.eval(), _figures(decider, merged, card)


def _figures(decider: Router, merged: Merged, card: Card) -> dict[str, float]:
    values, labels = [], []
    for steps in read(merged, card, merged.calibration):
        values.append(decider.probabilities(steps.inputs_SF))
        labels.append(steps.hard_S.cpu().numpy())
    p_S, hard_S = np.concatenate(values), np.concatenate(labels)
    if hard_S.all() or not hard_S.any():
        raise ValueError(f"decider: {hard_S.sum()} of {len(hard_S)} held-out steps are hard; both kinds are needed")
    second_S = p_S > decider.settings.threshold
    return {
        "hard": float(hard_S.mean()),
        "second_passes": float(second_S.mean()),
        "recall": float(second_S[hard_S].mean()),
        "auc": auc(p_S, hard_S),
    }


@torch.no_grad()
def read(merged: Merged, card: Card, items: Sequence[Trajectory]) -> Iterator[Steps]:
    """The decoding states of trajectories, `distil.micro_batch` tokens at a time."""
    model, head = merged.model, OutputHead(merged.model)
    vocabulary, hidden = len(model.get_output_embeddings().weight), model.config.hidden_size
    reserved = torch.tensor(merged.reserved_ids, dtype=torch.long, device=model.device)

    def see(last_SH: torch.Tensor, states_SF: torch.Tensor, teacher_S: torch.Tensor) -> torch.Tensor:
        logits_SV = head(last_SH).float().index_fill(-1, reserved, NEVER)
        hard_S = logits_SV.argmax(-1) != teacher_S
        return torch.cat([decider_inputs(states_SF, logits_SV, card.support), hard_S[:, None]], dim=-1)

    by_length = sorted(items, key=lambda item: len(item.tree.tokens))
    for piece in pieces([len(item.tree.tokens) for item in by_length], merged.recipe.distil.micro_batch):
        batch = collate(by_length[piece], model.device, leaves=False)
        states_SF = batch.packed.states(decode(model, **batch.packed.inputs(), layers=card.layers))
        both_SF = per_state(see, vocabulary, states_SF[:, -hidden:], states_SF[:, :-hidden], batch.teacher_S)
        yield Steps(both_SF[:, :-1], both_SF[:, -1].bool())
