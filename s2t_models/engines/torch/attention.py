"""Attention of this project's own under transformers' attention interface: what the model classes pass, checked once.

The cache of the engine, the tree mask of training and the plan of what training keeps each bring a way to attend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface


class UnsupportedAttention(Exception):
    """The model's attention does something that cannot be expressed here; the message says what."""


@dataclass(frozen=True)
class Layer:
    """What a layer asks of its attention: the sliding `window` and the soft `cap` of its logits, None where it has
    none, and the share of weights dropped in training."""

    number: int
    scale: float
    window: int | None
    cap: float | None
    dropout: float


#: (what was passed down to the layers, the layer, query, key, value [B, heads, L, D]) -> output [B, L, heads, D]
Attend = Callable[[Any, Layer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def register(name: str, argument: str, attend: Attend) -> None:
    """Make `attend` the attention of models whose implementation is called `name`. It gets what their decoder was given
    as the keyword `argument`; a layer that has not got it, or asks for more, raises UnsupportedAttention."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **passed: Any,
    ) -> tuple[torch.Tensor, None]:
        if passed.get(argument) is None:
            raise UnsupportedAttention("its class does not pass arguments on to its attention")
        if s_aux is not None:
            raise UnsupportedAttention("its attention has sinks")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        number = int(module.layer_idx)  # type: ignore[arg-type]
        layer = Layer(number, scale, sliding_window, softcap, dropout)
        return attend(passed[argument], layer, query, key, value), None

    AttentionInterface.register(name, attention)


def capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """Attention whose logits are soft-capped before the mask (Gemma 2), which no fused kernel offers."""
    logits = torch.tanh(query @ key.transpose(-1, -2) * scale / cap) * cap + mask
    return logits.float().softmax(-1).to(value.dtype) @ value
