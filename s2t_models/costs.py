"""What a model takes in memory and arithmetic, from its configuration alone.

Everything is read from the model's own modules on the meta device, where tensors have shapes and no data: there is no
formula a family, and no weight is read.

Axes: _L token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from s2t_models.engines.torch.attention import Layer, register
from s2t_models.engines.torch.families import default_context
from s2t_models.engines.torch.slots import cache_shape
from s2t_models.loading import load_config
from s2t_models.settings import ModelSettings
from s2t_models.training.selector import Selector
from s2t_models.training.tree_attention import Sight, capped, decode
from s2t_models.training_settings import LoraSettings

ATTENTION = "s2t_shapes"


@dataclass(frozen=True)
class ModelCost:
    """The cost of the model that `settings` name. Raises RecipeError where its configuration cannot be had or used."""

    settings: ModelSettings

    @cached_property
    def model(self) -> Any:
        """The model on the meta device, in its dtype."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(load_config(self.settings), dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)  # type: ignore[no-any-return]

    @cached_property
    def parameters(self) -> int:
        """All of them; tied ones count once."""
        return sum(value.numel() for value in self.model.parameters())

    @property
    def weights(self) -> int:
        """Bytes of the parameters."""
        return self.parameters * self.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    @cached_property
    def head(self) -> int:
        """Parameters of the output embedding."""
        return int(self.model.get_output_embeddings().weight.numel())

    @cached_property
    def body(self) -> int:
        """Parameters that every token goes through: all but the embeddings of either end."""
        ends = {self.model.get_input_embeddings().weight, self.model.get_output_embeddings().weight}
        return self.parameters - sum(value.numel() for value in ends)

    @cached_property
    def context(self) -> int:
        """Tokens of a slot."""
        return self.settings.context or default_context(self.model)

    def cache(self, slots: int, context: int | None = None, second: bool = False) -> int:
        """Bytes of the torch engine's static KV cache, with `second` with room for second passes."""
        shape = cache_shape(self.model.config, slots, context or self.context, second)
        return torch.Size(shape).numel() * self.dtype.itemsize

    def flops(self, tokens: float, seen: float, heads: float | None = None) -> float:
        """Of a forward over `tokens` tokens that see `seen` tokens each on average; the output head is computed at
        `heads` of them, by default at all."""
        config = self.model.config
        _, _, _, _, _, head_dim = cache_shape(config, 1, 1)
        attention = 4 * config.num_attention_heads * head_dim * self.layers * seen
        return tokens * (2 * self.body + attention) + 2 * self.head * (tokens if heads is None else heads)


@dataclass(frozen=True)
class TrainingCost:
    """What training a selector on this SLM adds: its trained parameters, and bytes of activations a packed token."""

    trained: int
    #: Kept for the backward pass, where rows are `length` tokens long.
    activations: float
    #: Kept with gradient checkpointing: each layer's input, and the activations of the one layer at work.
    checkpointed: float


def training_cost(cost: ModelCost, lora: LoraSettings, reserved: int, length: int) -> TrainingCost:
    """Run the selector's own forward over one row of `length` tokens on the meta device, and add up what autograd
    keeps.

    Attention counts as a fused kernel, which keeps its inputs, output and one number a query; soft-capped attention
    keeps its scores, as it does. LoRA factors count in the model's precision, in which they are computed."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(cost.settings), dtype=cost.dtype)
        rows = tuple(range(cost.vocabulary - reserved, cost.vocabulary))
        selector = Selector(model, rows, lora).train()
        trained = sum(value.numel() for value in selector.parameters() if value.requires_grad)
        selector.to(cost.dtype)
        model.set_attn_implementation(ATTENTION)
        own = {value.untyped_storage()._cdata for value in [*selector.parameters(), *selector.buffers()]}
        kept: dict[int, torch.Tensor] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            kept[value.untyped_storage()._cdata] = value
            return value

        ids_1L = torch.zeros(1, length, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            decode(selector.model, ids_1L, sight=Sight(ids_1L, ids_1L))
    saved = sum(value.untyped_storage().nbytes() for place, value in kept.items() if place not in own) / length
    inputs = cost.layers * model.config.hidden_size * cost.dtype.itemsize
    return TrainingCost(trained, saved, inputs + saved / cost.layers)


class _Fused(torch.autograd.Function):
    """The shapes of a fused attention kernel."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _attend(sight: Sight, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    fused = layer.cap is None
    out = _Fused.apply(query, key, value) if fused else capped(sight, layer, query, key, value)
    return out.transpose(1, 2).contiguous()


register(ATTENTION, "sight", _attend)
