"""Training of Think-at-Hard's decider: from the first pass's states and logits, which tokens are hard.

The base is frozen, so a training's steps are read once, and what the decider reads of them is kept: F numbers a step,
of `distil.tah.most_steps` steps at most. Axes: _M step of any trajectory, _S decoding state of a batch, _F feature,
_V text vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from s2t_models.output_head import OutputHead
from s2t_models.router import Router, RouterConfig
from s2t_models.second_pass import Card, decider_inputs
from s2t_models.training.batches import Trajectory
from s2t_models.training.per_state import per_state
from s2t_models.training.products import Merged, drawn, over_steps
from s2t_models.training.selector import NEVER
from s2t_models.training.trigger_head import auc

#: As published: how the learning rate rises and falls, and the norm that gradients are clipped to.
WARMUP, LOWEST_RATE, GRADIENT_NORM = 0.03, 0.1, 0.2


@dataclass(frozen=True)
class Steps:
    """Decoding states one after the other: what the decider reads of them, [M, F], or says of them, [M, 1], and
    whether they are hard, [M]."""

    values_MF: torch.Tensor
    hard_M: torch.Tensor


def train_decider(merged: Merged, card: Card) -> tuple[Router, dict[str, float]]:
    """Train on the trajectories of `merged`, whose model is the frozen base; returns the decider in eval mode, and its
    figures on the calibration trajectories: `hard`, the share of hard steps, `second_passes`, the share that it sends
    through a second pass at the recipe's threshold, `recall`, how many of the hard ones are among them, and `auc`.

    A batch's gradient is that of the mean over all steps of its trajectories. `merged.report` hears of the reading,
    which counts as one epoch, and of each batch. Raises ValueError where the calibration steps are all hard or none
    is."""
    recipe, settings, model = merged.recipe, merged.recipe.distil.tah, merged.model
    training = drawn(merged.training, settings.most_steps, recipe.seed)
    lengths = [len(item.kl_T) for item in training]
    passes = settings.epochs + 1
    steps = read(merged, card, training, report=lambda share: merged.report(share / passes, {}))
    trajectories = torch.arange(sum(lengths), device=model.device).split(lengths)
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
        done = 0
        for _ in range(settings.epochs):
            for batch in torch.randperm(len(training), generator=generator).split(settings.batch):
                batch_S = torch.cat([trajectories[int(place)] for place in batch])
                optimizer.zero_grad()
                total = 0.0
                for piece_S in batch_S.split(recipe.distil.micro_batch):
                    logits_S, labels_S = decider(steps.values_MF[piece_S]), steps.hard_M[piece_S].float()
                    loss = F.binary_cross_entropy_with_logits(logits_S, labels_S, pos_weight=weight, reduction="sum")
                    loss = loss / len(batch_S)
                    loss.backward()
                    total += loss.item()
                nn.utils.clip_grad_norm_(decider.parameters(), GRADIENT_NORM)
                optimizer.step()
                schedule.step()
                done += 1
                merged.report((1 + settings.epochs * done / batches) / passes, {"decider/loss": total})
    return decider.eval(), _figures(decider, merged, card)


def _figures(decider: Router, merged: Merged, card: Card) -> dict[str, float]:
    steps = read(merged, card, merged.calibration, lambda inputs_SF: decider(inputs_SF).sigmoid()[:, None])
    p_M, hard_M = steps.values_MF[:, 0].cpu().numpy(), steps.hard_M.cpu().numpy()
    if hard_M.all() or not hard_M.any():
        raise ValueError(f"decider: {hard_M.sum()} of {len(hard_M)} held-out steps are hard; both kinds are needed")
    second_M = p_M > decider.settings.threshold
    return {
        "hard": float(hard_M.mean()),
        "second_passes": float(second_M.mean()),
        "recall": float(second_M[hard_M].mean()),
        "auc": auc(p_M, hard_M),
    }


def read(
    merged: Merged,
    card: Card,
    items: Sequence[Trajectory],
    of: Callable[[torch.Tensor], torch.Tensor] = lambda inputs_SF: inputs_SF,
    report: Callable[[float], None] = lambda share: None,
) -> Steps:
    """The decoding states of trajectories in their order, each computed once: `of` what the decider reads of them,
    [S, F], and whether they are hard. `report` hears what share of them has been read."""
    model, head = merged.model, OutputHead(merged.model)
    vocabulary, hidden = len(model.get_output_embeddings().weight), model.config.hidden_size
    reserved = torch.tensor(merged.reserved_ids, dtype=torch.long, device=model.device)
    steps, seen = sum(len(item.kl_T) for item in items), 0

    def see(last_SH: torch.Tensor, states_SF: torch.Tensor) -> torch.Tensor:
        logits_SV = head(last_SH).float().index_fill(-1, reserved, NEVER)
        own_S = logits_SV.argmax(-1, keepdim=True)
        return torch.cat([of(decider_inputs(states_SF, logits_SV, card.support)), own_S], dim=-1)

    def see_all(states_SF: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        both_SF = per_state(see, vocabulary, states_SF[:, -hidden:], states_SF[:, :-hidden])
        seen += len(both_SF)
        report(seen / steps)
        return both_SF

    both_MF = over_steps(model, items, merged.recipe.distil.micro_batch, see_all, card.layers)
    teacher_M = torch.from_numpy(np.concatenate([item.teacher_T for item in items])).to(model.device)
    return Steps(both_MF[:, :-1], both_MF[:, -1].long() != teacher_M)
