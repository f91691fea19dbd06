"""Think-at-Hard in the torch engine: the decider says which tokens are hard, and the logits of their two passes add.

The second pass itself is a query of its own (`slots`), and when it is run is the call's part (`calls`).

Axes: _B row, _V vocabulary, _F feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from s2t_models.engines.torch.calls import Feed, Step
from s2t_models.second_pass import decider_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2t_models.engines.torch.slots import Slots
    from s2t_models.second_pass import SecondPass


class SecondPasses:
    """The decider and the LoRA beside a model. Raises SecondPassError where these are another model's."""

    def __init__(self, second: SecondPass, model: PreTrainedModel, slots: Slots) -> None:
        self.card = second.card
        slots.gate = second.attach(model)
        self._decider = second.decider().to(model.device)

    def layers(self, feeds: Sequence[Feed]) -> tuple[int, ...]:
        """The layers whose hidden states a forward of these feeds has to give."""
        return self.card.layers if any(feed.decide for feed in feeds) else ()

    def add_first(self, logits_BV: torch.Tensor, feeds: Sequence[Feed]) -> int:
        """Add to the logits of second passes, in place, those of the first ones; returns how many there are."""
        second = {row: feed.first_V for row, feed in enumerate(feeds) if feed.first_V is not None}
        for row, first_V in second.items():
            logits_BV[row] += first_V
        return len(second)

    def decide(
        self, states_BF: torch.Tensor, logits_BV: torch.Tensor, feeds: Sequence[Feed], steps: Sequence[Step]
    ) -> None:
        """Let the decider say how hard the tokens are of which that is asked."""
        rows = [row for row, feed in enumerate(feeds) if feed.decide]
        inputs = decider_inputs(states_BF[rows], logits_BV[rows], self.card.support)
        for row, hard in zip(rows, self._decider.probabilities(inputs).tolist(), strict=True):
            steps[row].hard = hard
