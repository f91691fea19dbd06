"""What an objective is: the losses of a training, how its model chooses, and what becomes of it.

Batches, the optimiser, workers, evaluation and checkpoints are the trainer's, and the same for every objective.

Axes: _S decoding state, _G group, _K candidate, _V text vocabulary, _H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from s2t_models import artifact
from s2t_models.provenance import Provenance
from s2t_models.recipe import Distil
from s2t_models.training.batches import Batch, Trajectory
from s2t_models.training.products import Merged, save_checkpoint
from s2t_models.training.selector import ROWS


@dataclass(frozen=True)
class Outputs:
    """What the models say of a batch: the frozen base's text logits at every decoding state and the tuned model's
    (those of group g are at `batch.packed.state_G[g]`), and the scores of the candidates (no columns where no leaves
    were packed)."""

    base_SV: torch.Tensor
    tuned_SV: torch.Tensor
    scores_GK: torch.Tensor


@dataclass(frozen=True)
class Term:
    """One term of a loss: `value`, a mean over what `per` counts (see `Objective.count`), enters the loss with
    `weight`."""

    name: str
    value: torch.Tensor
    weight: float
    per: str


class Objective(ABC):
    """One way to train on labelled steps, made with the recipe's `distil` settings."""

    #: Whether candidates are scored: without it trajectories are packed without leaves.
    needs_leaves: ClassVar[bool] = False
    #: The file by which the product's folder is known, so that nothing else is overwritten.
    mark: ClassVar[str] = artifact.CHECKPOINT

    def __init__(self, settings: Distil) -> None:
        self.settings = settings

    def trains(self, parameter: str) -> bool:
        """Whether the selector's parameter of this name is trained: a LoRA factor, or the reserved rows
        (`selector.ROWS`). By default the rows are not."""
        return parameter != ROWS

    def count(self, items: Sequence[Trajectory]) -> dict[str, int]:
        """How many of each thing that terms are means over there are in some trajectories. The trainer weights the
        terms of a part of a batch by its share of the counts, so that every gradient is that of the whole batch's
        mean."""
        return {
            "groups": sum(len(item.tree.prefixes_G) for item in items),
            "states": sum(len(item.kl_T) for item in items),
        }

    @abstractmethod
    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        """The terms of the loss."""

    @abstractmethod
    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        """How the trained model decides, for evaluation: its preference over the candidates, [G, K], and the token it
        would write, [G]."""

    def save(self, merged: Merged, output: Path) -> Provenance:
        """Write what the training produces to `output`, by default a plain checkpoint; returns its provenance as
        written."""
        return save_checkpoint(merged, output)
