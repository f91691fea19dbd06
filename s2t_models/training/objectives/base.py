"""What an objective is: the losses of a training, how its model chooses, and what becomes of it.

Batches, the optimiser, workers, evaluation and checkpoints are the trainer's, and the same for every objective.

Axes: _S decoding state, _G group, _K candidate, _V text vocabulary, _H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from s2t_models import artifact
from s2t_models.provenance import Provenance
from s2t_models.settings import Role
from s2t_models.storage import Location
from s2t_models.training import losses
from s2t_models.training.batches import NO_CANDIDATE, Batch, Trajectory, drop_narrow_margins
from s2t_models.training.per_state import per_state
from s2t_models.training.products import Merged, save_checkpoint
from s2t_models.training.selector import ROWS, Selector
from s2t_models.training_settings import DistilSettings, LoraSettings


@dataclass(frozen=True)
class Reading:
    """What the teacher says of a batch: its hidden states at every decoding state, and its head, [S, H] -> [S, V]."""

    states_SH: torch.Tensor
    text_logits: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Outputs:
    """What the models say of a batch: the hidden states of the frozen base and of the tuned model at every decoding
    state (those of group g are at `batch.packed.state_G[g]`), and the scores of the candidates (no columns where no
    leaves were packed). `text_logits` is the head of both, [S, H] -> [S, V]; its logits are never there for all states
    at once (`per_state`). Base and teacher are there where the objective asks for them; `progress` is the share of the
    training that is done."""

    base_SH: torch.Tensor | None
    tuned_SH: torch.Tensor
    scores_GK: torch.Tensor
    text_logits: Callable[[torch.Tensor], torch.Tensor]
    vocabulary: int
    teacher: Reading | None = None
    progress: float = 0.0

    def drift(self) -> torch.Tensor:
        """KL(base || tuned) over the text vocabulary at each state, [S], in nats (Eq. 8)."""

        def drift(tuned_SH: torch.Tensor, base_SH: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                base_SV = self.text_logits(base_SH)
            return losses.stability(base_SV, self.text_logits(tuned_SH))

        assert self.base_SH is not None
        return per_state(drift, self.vocabulary, self.tuned_SH, self.base_SH)

    @torch.no_grad()
    def prior(self, state_G: torch.Tensor, candidates_GK: torch.Tensor) -> torch.Tensor:
        """log p of the candidates (-1: none) under the frozen base at some of the states, [G, K], in nats."""

        def logprobs(base_GH: torch.Tensor, candidates_GK: torch.Tensor) -> torch.Tensor:
            base_GV = self.text_logits(base_GH)
            return base_GV.gather(1, candidates_GK) - base_GV.logsumexp(-1, keepdim=True)

        assert self.base_SH is not None
        prior_GK = per_state(logprobs, self.vocabulary, self.base_SH[state_G], candidates_GK.clamp(min=0))
        return prior_GK.masked_fill(candidates_GK < 0, NO_CANDIDATE)

    def at(self, state_G: torch.Tensor, function: Callable[..., torch.Tensor], *given_G: torch.Tensor) -> torch.Tensor:
        """`function(logits, *given)` of the tuned model's text logits at some of the states, one number each, [G];
        `given_G` has a row for each of them. A gradient flows back to the model."""

        def of_hidden(tuned_GH: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            return function(self.text_logits(tuned_GH), *given)

        return per_state(of_hidden, self.vocabulary, self.tuned_SH[state_G], *given_G)

    def surprisal(self, state_G: torch.Tensor, token_G: torch.Tensor) -> torch.Tensor:
        """-log p of a token under the tuned model at some of the states, [G], in nats."""
        return self.at(state_G, partial(F.cross_entropy, reduction="none"), token_G)

    @torch.no_grad()
    def text_choice(self, state_G: torch.Tensor, candidates_GK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tuned model's logits of the candidates at some of the states, [G, K], and its likeliest token, [G]."""

        def choice(text_GV: torch.Tensor, candidates_GK: torch.Tensor) -> torch.Tensor:
            best_G1 = text_GV.argmax(-1, keepdim=True)
            return torch.cat([text_GV.gather(1, candidates_GK).double(), best_G1.double()], dim=1)

        both = self.at(state_G, choice, candidates_GK.clamp(min=0))
        return both[:, :-1].float(), both[:, -1].long()


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
    #: Whether its LoRA stays apart: the product is made of the frozen base then, not of the merged model.
    keeps_lora_apart: ClassVar[bool] = False
    #: What is trained for its product once the training is done, where that takes long.
    trains_after: ClassVar[str | None] = None
    #: Whether its terms take the frozen base's states.
    needs_base: ClassVar[bool] = True
    #: Which model rolled out the collection that is trained on.
    drafter: ClassVar[Role] = "slm"
    #: Trained on what the tuned model writes to the collection's prompts, read by the teacher, and not on the
    #: collection's own texts; those of held-out prompts are evaluated on.
    on_policy: ClassVar[bool] = False
    #: The file by which the product's folder is known, so that nothing else is overwritten.
    mark: ClassVar[str] = artifact.CHECKPOINT

    def __init__(self, settings: DistilSettings) -> None:
        self.settings = settings

    @property
    def lora(self) -> LoraSettings:
        """The LoRA that is trained."""
        return self.settings.lora

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.settings.learning_rate

    @property
    def warmup(self) -> float:
        """The share of the steps in which the learning rate rises."""
        return self.settings.warmup

    def labelled(self, item: Trajectory) -> Trajectory:
        """The trajectory with the groups that are trained on: by default those where the teacher is sure enough
        (D.4)."""
        return drop_narrow_margins(item, self.settings.min_teacher_margin)

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

    def outputs(self, batch: Batch, base_SH: torch.Tensor | None, selector: Selector, model: nn.Module) -> Outputs:
        """What the models say of a batch. `model` is the selector, wrapped where gradients are to be kept in step."""
        hidden_BLH = model(**batch.packed.inputs())
        return Outputs(
            base_SH=base_SH,
            tuned_SH=batch.packed.states(hidden_BLH),
            scores_GK=selector.scores(batch.packed.leaves(hidden_BLH)),
            text_logits=selector.text_logits,
            vocabulary=selector.vocabulary,
        )

    @abstractmethod
    def terms(self, batch: Batch, outputs: Outputs) -> list[Term]:
        """The terms of the loss."""

    @abstractmethod
    def choose(self, batch: Batch, outputs: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
        """How the trained model decides, for evaluation: its preference over the candidates, [G, K], and the token it
        would write, [G]."""

    def save(self, merged: Merged, output: Location) -> Provenance:
        """Write what the training produces to `output`, by default a plain checkpoint; returns its provenance as
        written."""
        return save_checkpoint(merged, output)
