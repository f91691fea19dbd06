"""From hidden states to logits, by the model class's own code.

What follows the decoder differs between families: the output embedding alone, or also a scale (Granite, Cohere) or a
soft cap (Gemma). None of it is written again here: the class's own `forward` is called with a decoder that hands back
hidden states that are already computed. Engine and training read their logits here. Axes: _R row, _V vocabulary, _H
hidden.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, MoeModelOutputWithPast

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _DecoderOutput(MoeModelOutputWithPast, BaseModelOutputWithPastAndCrossAttentions):
    """Every field that a class may read of its decoder's output; all are None but the hidden states."""


class _Computed(nn.Module):
    """Stands in for the decoder: its inputs are the hidden states."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]  # typed as a CPU tensor


class _Rows(nn.Module):
    """Stands in for the output embedding: the rows and biases it was last given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.given is not None
        return F.linear(hidden, *self.given)


class OutputHead:
    """The output head of `model`, sharing its weights. Not a module: the parameters stay the model's.

    Raises AttributeError where the class has no decoder or no output embedding of its own."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder, output = model.get_decoder(), model.get_output_embeddings()
        if decoder is model or output is None:
            raise AttributeError(f"{type(model).__name__} has no decoder and output embedding to tell apart")
        self._all = _replaced(model, _path(model, decoder), _Computed())
        self._rows = _Rows()
        self._some = _replaced(self._all, _path(model, output), self._rows)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary, [..., H] -> [..., V]."""
        return _run(self._all, hidden)

    def rows(self, hidden: torch.Tensor, weight_RH: torch.Tensor, bias_R: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of these rows of the output embedding, [..., H] -> [..., R], scaled and capped like all others."""
        self._rows.given = weight_RH, bias_R
        return _run(self._some, hidden)


def _run(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    logits = model(inputs_embeds=hidden.reshape(1, -1, hidden.shape[-1]), use_cache=False).logits
    return logits.reshape(*hidden.shape[:-1], logits.shape[-1])


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, candidate in model.named_modules() if candidate is module)


def _replaced(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """A shallow copy of `model` with another module at `path`; the original stays as it is."""
    changed = copy.copy(model)
    changed._modules = dict(model._modules)
    name, _, rest = path.partition(".")
    child = changed._modules[name]
    assert child is not None
    changed._modules[name] = _replaced(child, rest, module) if rest else module
    return changed
