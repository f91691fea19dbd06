"""The optimisation itself: one `Trainer` a worker, for the selector (Eqs. 6-8, 13, 14) and the `kd` control.

Both objectives get the same trajectories, labelled groups, LoRA and batches. A step depends on (seed, step, rank) alone,
so a trainer that takes up a saved state goes on where it stopped (but for rounding). The module knows nothing of Ray: data
parallelism comes in through `wrap` and torch.distributed.

Axes: _S decoding state, _G group, _K candidate, _V text vocabulary, _H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from s2t_models.loading import load_model
from s2t_models.recipe import Recipe
from s2t_models.reserved import reserved_rows
from s2t_models.training import losses
from s2t_models.training.batches import BatchOrder, Labels, Trajectory, collate, decisive, split_by_prompt
from s2t_models.training.selector import Selector

Objective = Literal["selector", "kd"]

#: Trajectories in one forward; more a worker are accumulated.
MICRO_BATCH = 8
GRADIENT_NORM = 1.0


def load_selector(recipe: Recipe) -> Selector:
    """The recipe's SLM with a fresh LoRA and its reserved rows, on its device."""
    torch.manual_seed(recipe.seed)
    model = load_model(recipe.slm)
    ids = reserved_rows(recipe)
    return Selector(model, ids, recipe.distil.lora).to(model.device)


class Trainer:
    """Trains one replica of the selector. `wrap` makes it data-parallel; `rank` of `world` says which share of each batch is
    this worker's."""

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        data: Sequence[Trajectory],
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.settings, self.seed, self.objective = recipe.distil, recipe.seed, objective
        self.rank, self.world = rank, world
        training, self.validation = split_by_prompt(data, self.settings.validation, recipe.seed)
        self.training = [decisive(item, self.settings.min_teacher_margin) for item in training]
        self.selector = load_selector(recipe)
        self.selector.rows_RH.requires_grad_(objective == "selector")
        self.wrapped = wrap(self.selector)
        self.device = self.selector.rows_RH.device
        self.parameters = [value for value in self.selector.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        lengths = [item.tree.length if self.leaves else len(item.tree.tokens) for item in self.training]
        self.order = BatchOrder(lengths, self.settings.batch, recipe.seed)
        self.step = 0
        self._base: dict[str, torch.Tensor] = {}  # uid -> the frozen base's states [T, H]: they never change

    @property
    def leaves(self) -> bool:
        """Whether the objective scores candidates; `kd` reads its text logits alone."""
        return self.objective == "selector"

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns the parts of this worker's loss, whose mean over the workers is the batch's."""
        torch.manual_seed((self.seed * 1_000_003 + self.step) * self.world + self.rank)
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mine = self.order(self.step)[self.rank :: self.world]
        pieces = [mine[start : start + MICRO_BATCH] for start in range(0, len(mine), MICRO_BATCH)]
        whole = self._count([self.training[i] for i in self.order(self.step)])
        self.wrapped.train()
        self.optimizer.zero_grad()
        total: dict[str, float] = {}
        for piece in pieces:
            items = [self.training[i] for i in piece]
            groups, states = self._count(items)
            # The gradient is that of the mean over the whole batch, however it is spread over pieces and workers: workers
            # are averaged, so each one's share counts `world` times.
            share = (self.world * groups / max(whole[0], 1), self.world * states / max(whole[1], 1))
            loss, parts = self._loss(items, collate(items, self.device, self.leaves), *share)
            loss.backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                total[name] = total.get(name, 0.0) + float(value)
        norm = nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        return total | {"gradient_norm": norm.item(), "learning_rate": rate}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Figures on the held-out prompts, over all workers.

        `agree_at_1`: how often the choice is the teacher's, on the `top_steps` steps kept by KL; `selection_loss` the cross-entropy
        of that choice among the candidates (Eq. 7), mean over them; `agree_at_1_random` on the random ones; `agree_at_1_slm` for
        the SLM's own ranking on the top steps; `spearman` between preferences and the teacher's log-probabilities, mean over
        all groups; `kl_to_base` in nats, mean over steps.
        """
        self.wrapped.eval()
        by_length = sorted(self.validation, key=lambda item: item.tree.length)[self.rank :: self.world]
        names = ("tops", "loss", "right", "slm", "randoms", "right_random", "ranked", "spearman", "steps", "drift")
        sums = dict.fromkeys(names, 0.0)
        for start in range(0, len(by_length), MICRO_BATCH):
            items = by_length[start : start + MICRO_BATCH]
            labels = collate(items, self.device, self.leaves)
            preference_GK, choice_G, tuned_SV = self._preferences(labels)
            target_G, _ = losses.teacher_choice(labels.teacher_logprobs_GK, labels.valid_GK)
            token_G = labels.candidates_GK.gather(1, target_G[:, None])[:, 0]
            slm_G = labels.candidates_GK.gather(1, labels.slm_logprobs_GK.argmax(-1)[:, None])[:, 0]
            top = labels.by_kl_G
            several = labels.valid_GK.sum(-1) > 1
            spearman_G = _spearman(preference_GK, labels.teacher_logprobs_GK, labels.valid_GK)[several]
            drift_S = losses.stability(self._base_logits(items, labels), tuned_SV)
            agree_G = choice_G == token_G
            for name, value in (
                ("tops", top.sum()),
                ("loss", losses.selection(preference_GK[top], target_G[top], labels.valid_GK[top]) * top.sum()),
                ("right", (agree_G & top).sum()),
                ("slm", (slm_G == token_G)[top].sum()),
                ("randoms", (~top).sum()),
                ("right_random", (agree_G & ~top).sum()),
                ("ranked", several.sum()),
                ("spearman", spearman_G.sum()),
                ("steps", len(drift_S)),
                ("drift", drift_S.sum()),
            ):
                sums[name] += float(value)
        if self.world > 1:
            together = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
            dist.all_reduce(together)
            sums = dict(zip(sums, together.tolist(), strict=True))
        tops = max(sums["tops"], 1)
        return {
            "top_steps": sums["tops"],
            "agree_at_1": sums["right"] / tops,
            "selection_loss": sums["loss"] / tops,
            "agree_at_1_random": sums["right_random"] / max(sums["randoms"], 1),
            "agree_at_1_slm": sums["slm"] / tops,
            "spearman": sums["spearman"] / max(sums["ranked"], 1),
            "kl_to_base": sums["drift"] / max(sums["steps"], 1),
        }

    def state(self) -> dict[str, Any]:
        """Everything a later trainer needs to go on from here."""
        return {"step": self.step, "trained": self.selector.trained(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.step = state["step"]
        self.selector.load_trained(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _learning_rate(self) -> float:
        """Linear warm-up, then cosine to zero."""
        total, peak = self.settings.steps, self.settings.learning_rate
        warmup = round(self.settings.warmup * total)
        if self.step < warmup:
            return peak * (self.step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(total - warmup, 1)))

    def _count(self, items: Sequence[Trajectory]) -> tuple[int, int]:
        """The groups, and the states held to the base model: all of them, or with `kd` those without a label."""
        groups = sum(len(item.tree.prefixes_G) for item in items)
        states = sum(len(item.kl_T) for item in items)
        return groups, states if self.leaves else states - groups

    def _loss(
        self, items: list[Trajectory], labels: Labels, groups: float, states: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a piece of the batch (Eqs. 6-8, 13, 14) and its parts: means over the piece's groups and states, by
        the piece's share of the batch's `groups` and `states`."""
        settings, packed = self.settings, labels.packed
        base_SV = self._base_logits(items, labels)
        hidden_BLH = self.wrapped(**packed.inputs())
        tuned_SV = self.selector.text_logits(packed.states(hidden_BLH))
        target_G, _ = losses.teacher_choice(labels.teacher_logprobs_GK, labels.valid_GK)
        if self.objective == "kd":
            token_G = labels.candidates_GK.gather(1, target_G[:, None])[:, 0]
            answer, drift = losses.distillation(base_SV, tuned_SV, packed.state_G, token_G)
            answer, drift = groups * answer, states * drift
            return answer + settings.kd_beta * drift, {"kd_loss": answer.detach(), "kl_loss": drift.detach()}
        scores_GK = self.selector.scores(packed.leaves(hidden_BLH))
        preference_GK = losses.preference(
            scores_GK, labels.slm_logprobs_GK, settings.temperature, settings.prior_weight
        )
        selection = groups * losses.selection(preference_GK, target_G, labels.valid_GK)
        margin = groups * losses.margin(preference_GK, scores_GK, target_G, labels.valid_GK, settings.temperature)
        drift = states * losses.stability(base_SV, tuned_SV).mean()
        loss = selection + settings.margin * margin + settings.beta * drift
        return loss, {
            "selection_loss": selection.detach(),
            "margin_loss": margin.detach(),
            "kl_loss": drift.detach(),
        }

    def _base_logits(self, items: list[Trajectory], labels: Labels) -> torch.Tensor:
        """The frozen base's text logits at the states of a batch, [S, V], from states that are computed once."""
        with torch.no_grad():
            if any(item.uid not in self._base for item in items):
                with self.selector.as_base():
                    states_SH = labels.packed.states(self.selector(**labels.packed.inputs(leaves=False)))
                for item, states_TH in zip(items, states_SH.split([len(item.kl_T) for item in items]), strict=True):
                    self._base[item.uid] = states_TH.clone()
            return self.selector.text_logits(torch.cat([self._base[item.uid] for item in items]))

    def _preferences(self, labels: Labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(preference over candidates [G, K], the token chosen [G], text logits [S, V]) of the tuned model."""
        hidden_BLH = self.selector(**labels.packed.inputs())
        tuned_SV = self.selector.text_logits(labels.packed.states(hidden_BLH))
        if self.objective == "kd":
            text_GV = tuned_SV[labels.packed.state_G]
            return text_GV.gather(1, labels.candidates_GK.clamp(min=0)), text_GV.argmax(-1), tuned_SV
        preference_GK = losses.preference(
            self.selector.scores(labels.packed.leaves(hidden_BLH)),
            labels.slm_logprobs_GK,
            self.settings.temperature,
            self.settings.prior_weight,
        )
        best_G = preference_GK.masked_fill(~labels.valid_GK, losses.EXCLUDED).argmax(-1)
        return preference_GK, labels.candidates_GK.gather(1, best_G[:, None])[:, 0], tuned_SV


def _spearman(left_GK: torch.Tensor, right_GK: torch.Tensor, valid_GK: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of each group's real candidates, [G]; nan where there is only one."""

    def centred_ranks(values_GK: torch.Tensor) -> torch.Tensor:
        lowest = values_GK.double().masked_fill(~valid_GK, -math.inf)
        rank_GK = lowest.argsort(-1).argsort(-1).double() * valid_GK
        return (rank_GK - rank_GK.sum(-1, keepdim=True) / valid_GK.sum(-1, keepdim=True)) * valid_GK

    left, right = centred_ranks(left_GK), centred_ranks(right_GK)
    return (left * right).sum(-1) / (left.square().sum(-1) * right.square().sum(-1)).sqrt()
