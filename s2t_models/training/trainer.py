"""The optimisation itself: one `Trainer` a worker, for whatever objective.

All objectives get the same trajectories, labelled groups, LoRA and batches. A step depends on (seed, step, rank) alone,
so a trainer that takes up a saved state goes on where it stopped (but for rounding). Data parallelism comes in through
`wrap` and torch.distributed.

Axes: _S decoding state, _B trajectory, _L packed token, _H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from s2t_models.loading import load_model
from s2t_models.recipe import Recipe
from s2t_models.reserved import reserved_rows
from s2t_models.training import evaluation
from s2t_models.training.batches import (
    Batch,
    BatchOrder,
    Trajectory,
    collate,
    pieces,
    split_by_prompt,
)
from s2t_models.training.objectives import objective
from s2t_models.training.objectives.base import Objective, Outputs, Reading
from s2t_models.training.rollouts import Rollouts
from s2t_models.training.selector import Selector
from s2t_models.training.teacher import Teacher

GRADIENT_NORM = 1.0


def load_selector(recipe: Recipe, objective: Objective) -> Selector:
    """The recipe's SLM with a fresh LoRA and the rows that score, on its device; what the objective trains has
    gradients."""
    torch.manual_seed(recipe.seed)
    model = load_model(recipe.slm)
    if recipe.distil.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    selector = Selector(model, reserved_rows(recipe), objective.lora, recipe.reserved.count).to(model.device)
    for name, value in selector.named_parameters():
        value.requires_grad_(value.requires_grad and objective.trains(name))
    return selector


class Trainer:
    """Trains one replica of the model. `wrap` makes it data-parallel; `rank` of `world` says which share of each batch
    is this worker's."""

    def __init__(
        self,
        recipe: Recipe,
        objective_name: str,
        data: Sequence[Trajectory],
        rank: int = 0,
        world: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.settings, self.seed = recipe.distil, recipe.seed
        self.objective = objective(objective_name, recipe.distil)
        self.rank, self.world = rank, world
        training, validation = split_by_prompt(data, self.settings.validation, recipe.seed)
        self.training = training.changed(self.objective.labelled)
        self.selector = load_selector(recipe, self.objective)
        self.wrapped = wrap(self.selector)
        self.device = self.selector.rows_RH.device
        self.parameters = [value for value in self.selector.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.objective.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.order = BatchOrder([self._length(item) for item in self.training], self.settings.batch, recipe.seed)
        self.validation = validation.at(np.argsort([item.tree.length for item in validation], kind="stable").tolist())
        self.step = 0
        #: Tokens that the teacher has read, for all workers, where it reads what the model writes: of those texts, and
        #: of the held-out ones, which were labelled.
        self.teacher_read = sum(len(item.tree.tokens) for item in validation) if self.objective.on_policy else 0
        if self.objective.on_policy:
            self.rollouts = Rollouts(recipe, self.selector, lambda step: list(self.training.at(self._mine(step))))
            self.teacher = Teacher(recipe, self.selector.vocabulary)
        self._base_states = BaseStates(int(self.settings.base_cache_gb * 2**30))

    def advance(self) -> dict[str, float]:
        """One optimiser step; returns the loss and its terms on this worker, whose mean over the workers is the
        batch's."""
        torch.manual_seed((self.seed * 1_000_003 + self.step) * self.world + self.rank)
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        forwards, whole = self._batch()
        self.wrapped.train()
        self.optimizer.zero_grad()
        total: dict[str, float] = {}
        for number, items in enumerate(forwards, 1):
            # Workers may have unlike numbers of forwards: gradients are put together once, at the last.
            with nullcontext() if number == len(forwards) else self._apart():
                loss, parts = self._loss(items, whole)
                loss.backward()
            for name, value in {"loss": loss, **parts}.items():
                total[name] = total.get(name, 0.0) + value.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        self.optimizer.step()
        self.step += 1
        return total | {"gradient_norm": norm.item(), "learning_rate": rate}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`evaluation.figures` on the held-out prompts, over all workers."""
        self.wrapped.eval()
        mine = self.validation[self.rank :: self.world]
        sums: dict[str, float] = dict.fromkeys(evaluation.SUMS, 0.0)
        for items in self._forwards(mine):
            batch = collate(items, self.device, self.objective.needs_leaves)
            outputs = self._outputs(batch, self.selector, base_SH=self._base(items, batch))
            for name, value in evaluation.add_up(batch, outputs, *self.objective.choose(batch, outputs)).items():
                sums[name] += float(value)
        if self.world > 1:
            together = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)
            dist.all_reduce(together)
            sums = dict(zip(sums, together.tolist(), strict=True))
        return evaluation.figures(sums)

    def state(self) -> dict[str, Any]:
        """Everything a later trainer needs to go on from here."""
        state: dict[str, Any] = {
            "step": self.step,
            "trained": self.selector.trained(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.objective.on_policy:
            state |= {"teacher_read": self.teacher_read, "rollout_weights": self.rollouts.weights}
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.step = state["step"]
        self.selector.load_trained(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.objective.on_policy:
            self.teacher_read = state["teacher_read"]
            self.rollouts.resume(state["rollout_weights"])

    def _mine(self, step: int) -> np.ndarray:
        """The places of this worker's share of a step's trajectories."""
        return self.order(step)[self.rank :: self.world]

    def _batch(self) -> tuple[list[Sequence[Trajectory]], dict[str, int]]:
        """This worker's forwards of the step's batch, and what `Objective.count` says of the whole of it."""
        if not self.objective.on_policy:
            batch = self.order(self.step)
            mine = list(self.training.at(self._mine(self.step)))
            return list(self._forwards(mine)), self.objective.count(self.training.at(batch))
        texts = self.rollouts.of(self.step)
        counts = self.objective.count(texts) | {"tokens": sum(len(text.tree.tokens) for text in texts)}
        if self.world > 1:  # how long the others' texts are is not known here
            together = torch.tensor(list(counts.values()), device=self.device)
            dist.all_reduce(together)
            counts = dict(zip(counts, together.tolist(), strict=True))
        self.teacher_read += counts["tokens"]
        return list(self._forwards(texts)), counts

    def _apart(self) -> AbstractContextManager[None]:
        """In it, gradients are this worker's own."""
        apart: AbstractContextManager[None] = getattr(self.wrapped, "no_sync", nullcontext)()
        return apart

    def _length(self, item: Trajectory) -> int:
        """How many tokens it has in a forward."""
        return item.tree.length if self.objective.needs_leaves else len(item.tree.tokens)

    def _forwards(self, items: Sequence[Trajectory]) -> Iterator[Sequence[Trajectory]]:
        """The trajectories of each forward; more than one holds are accumulated."""
        for piece in pieces([self._length(item) for item in items], self.settings.micro_batch):
            yield list(items[piece])

    def _learning_rate(self) -> float:
        """Linear warm-up, then cosine to zero."""
        total, peak = self.settings.steps, self.objective.learning_rate
        warmup = round(self.objective.warmup * total)
        if self.step < warmup:
            return peak * (self.step + 1) / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(total - warmup, 1)))

    def _loss(self, items: Sequence[Trajectory], whole: dict[str, int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What some of the batch's trajectories add to its loss, and to each term before its weight. `whole` is what
        `Objective.count` says of the batch."""
        batch = collate(items, self.device, self.objective.needs_leaves)
        base_SH = self._base(items, batch) if self.objective.needs_base else None
        teacher = self.teacher.read(batch.packed) if self.objective.on_policy else None
        outputs = self._outputs(batch, self.wrapped, base_SH, teacher)
        here = self.objective.count(items)
        loss, parts = torch.zeros((), device=self.device), {}
        for term in self.objective.terms(batch, outputs):
            # The gradient is that of the mean over the whole batch, however it is spread over forwards and workers:
            # workers are averaged, so each one's share counts `world` times.
            value = term.value * (self.world * here[term.per] / max(whole[term.per], 1))
            loss = loss + term.weight * value
            parts[term.name] = value.detach()
        return loss, parts

    def _outputs(
        self, batch: Batch, model: nn.Module, base_SH: torch.Tensor | None, teacher: Reading | None = None
    ) -> Outputs:
        """All models' outputs; `model` is the selector, wrapped where gradients are to be kept in step."""
        outputs = self.objective.outputs(batch, base_SH, self.selector, model)
        return replace(outputs, teacher=teacher, progress=self.step / self.settings.steps)

    def _base(self, items: Sequence[Trajectory], batch: Batch) -> torch.Tensor:
        """The frozen base's hidden states at the decoding states of a batch, [S, H]."""
        known = self._base_states.of(items)
        if known is None:
            with self.selector.as_base():
                known = batch.packed.states(self.selector(**batch.packed.inputs(leaves=False)))
            self._base_states.keep(items, known)
        return known.to(self.device)


class BaseStates:
    """The frozen base's states of trajectories, [T, H] each: they never change, so they are kept in memory, as many as
    `limit` bytes hold. What finds no room is computed again each time."""

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._states: dict[str, torch.Tensor] = {}

    def of(self, items: Sequence[Trajectory]) -> torch.Tensor | None:
        """Those of all the items, end to end, [S, H]; None where one is missing."""
        if any(item.uid not in self._states for item in items):
            return None
        return torch.cat([self._states[item.uid] for item in items])

    def keep(self, items: Sequence[Trajectory], states_SH: torch.Tensor) -> None:
        for item, states_TH in zip(items, states_SH.split([len(item.kl_T) for item in items]), strict=True):
            if item.uid not in self._states and states_TH.nbytes <= self._room:
                self._states[item.uid] = states_TH.to("cpu", copy=True)
                self._room -= states_TH.nbytes
