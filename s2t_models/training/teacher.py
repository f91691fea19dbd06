"""The teacher beside a training: what it says of texts that the tuned model has just written.

Its distribution over the whole vocabulary at every step would be gigabytes. Its hidden states are kept instead, and the
objective computes logits from them for a few states at a time (`per_state`). So the teacher's weights are on the
worker's own device.

Axes: _S decoding state, _H hidden, _V text vocabulary.
"""

from __future__ import annotations

import torch

from s2t_models.loading import load_model
from s2t_models.output_head import OutputHead
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.reserved import reserved_rows
from s2t_models.training.objectives.base import Reading
from s2t_models.training.selector import NEVER
from s2t_models.training.tree import TreeBatch
from s2t_models.training.tree_attention import decode, use_tree_attention


def check_teacher(recipe: Recipe) -> None:
    """Raise RecipeError where the teacher runs quantised: here its weights are read as they are."""
    if how := recipe.teacher.vllm.quantisation:
        raise RecipeError(
            f"teacher.vllm.quantisation = {how}: a training in which the teacher reads the model's own texts takes its "
            "weights as they are; leave it out, and name a model that fits beside the SLM"
        )


class Teacher:
    """The recipe's teacher, frozen. `vocabulary` is the SLM's: rows beyond it are left out."""

    def __init__(self, recipe: Recipe, vocabulary: int) -> None:
        self.model = load_model(recipe.teacher)
        use_tree_attention(self.model)
        self._output = OutputHead(self.model)
        self._vocabulary = vocabulary
        self._reserved_N = torch.tensor(reserved_rows(recipe), dtype=torch.long, device=self.model.device)

    @torch.no_grad()
    def read(self, packed: TreeBatch) -> Reading:
        """Its states at every decoding state of the texts."""
        packed = packed.to(self.model.device)
        return Reading(packed.states(decode(self.model, **packed.inputs(leaves=False))), self.text_logits)

    @torch.no_grad()
    def text_logits(self, states_SH: torch.Tensor) -> torch.Tensor:
        """Logits over the text vocabulary, [S, V]."""
        logits_SV = self._output(states_SH).float()[..., : self._vocabulary]
        reserved_N = self._reserved_N[self._reserved_N < logits_SV.shape[-1]]
        return logits_SV.index_fill(-1, reserved_N, NEVER)
