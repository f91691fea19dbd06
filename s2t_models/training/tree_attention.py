"""Attention under a tree mask, for any model whose attention goes through transformers' attention interface.

The mask is made on the model's device, once a forward and kind of layer: layers with a sliding window also leave out
what lies too far behind. Soft-capped layers are computed as they ask.

Axes: _B row, _L packed token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from s2t_models.engines.torch.attention import Layer, capped_attention, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "s2t_tree"


@dataclass
class Sight:
    """What each packed token sees: the first `seen_BL` tokens of its row, and itself; with `since_BL` also what stands
    between that column and its own. `positions_BL` are the tokens' own positions."""

    seen_BL: torch.Tensor
    positions_BL: torch.Tensor
    since_BL: torch.Tensor | None = None
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def causal(cls, ids_BL: torch.Tensor) -> Sight:
        """That of plain texts without padding."""
        at_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        return cls((at_L + 1).expand_as(ids_BL), at_L.expand_as(ids_BL))

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [B, 1, L, L]; with a `window`, tokens that many positions back or more are not seen."""
        if window not in self._masks:
            at_L = torch.arange(self.seen_BL.shape[1], device=self.seen_BL.device)
            sees_BLL = at_L < self.seen_BL[..., None]
            if self.since_BL is not None:
                sees_BLL |= (at_L >= self.since_BL[..., None]) & (at_L <= at_L[:, None])
            if window is not None:
                sees_BLL &= self.positions_BL[:, None] > self.positions_BL[..., None] - window
            sees_BLL |= at_L == at_L[:, None]  # padding too, so that no row is empty
            mask_BLL = torch.zeros(sees_BLL.shape, dtype=dtype, device=at_L.device)
            self._masks[window] = mask_BLL.masked_fill_(~sees_BLL, torch.finfo(dtype).min)[:, None]
        return self._masks[window]


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let the model's layers attend as `decode` says from now on."""
    model.set_attn_implementation(ATTENTION)


def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    sight: Sight | None = None,
    inputs_embeds: torch.Tensor | None = None,
    layers: Sequence[int] = (),
) -> torch.Tensor:
    """The hidden states after the last norm, [B, L, H]; without `sight`, of plain texts. With `layers`, those after
    each of these (0: the embeddings) come before them, laid end to end, [B, L, F]. The model has been given to
    `use_tree_attention`."""
    if sight is None:
        assert input_ids is not None
        sight = Sight.causal(input_ids)
    # Classes with kinds of layers look a mask up for each; the others make none for an attention of another name.
    kinds = getattr(model.config, "layer_types", None)
    masks = dict.fromkeys({*kinds, "full_attention"}) if kinds else None
    output = model.get_decoder()(
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=masks,
        position_ids=sight.positions_BL if position_ids is None else position_ids,
        use_cache=False,
        sight=sight,
        output_hidden_states=bool(layers),
    )
    if layers:
        return torch.cat([*(output.hidden_states[layer] for layer in layers), output.last_hidden_state], dim=-1)
    return output.last_hidden_state  # type: ignore[no-any-return]


def capped(sight: Sight, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What a soft-capped layer computes, [B, heads, L, D]."""
    assert layer.cap is not None
    repeats = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(repeats, dim=1) for states in (key, value))
    return capped_attention(query, key, value, sight.mask(layer.window, query.dtype), layer.scale, layer.cap)


def _attend(sight: Sight, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if layer.cap is None:
        out = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=sight.mask(layer.window, query.dtype),
            dropout_p=layer.dropout,
            scale=layer.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    else:
        out = capped(sight, layer, query, key, value)
    return out.transpose(1, 2).contiguous()


register(ATTENTION, "sight", _attend)
