"""The torch engine's cache and its one primitive forward.

Slots are the rows of a static KV cache, each at its own position. A forward takes any mix of queries, each some tokens
for one slot: a decode step (1 token), a prompt or a draft to verify (a chain of tokens), or a fan of K candidate leaves
(each seeing its prefix and itself). Queries are packed into one flat row of tokens, so that linear layers do no work
for padding between a decode step and a fan; attention runs once per group of queries of like length. transformers' own
modelling code does the rest, for any model whose attention goes through its attention interface.

Axes: _T flat token, _B query of a group, _Q token of a query, _L cache position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from s2t_models.engines.torch.attention import Layer, capped_attention, register
from s2t_models.settings import MOST_CANDIDATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "s2t_slots"
#: Cache columns past the context where leaves are written before one of them is kept.
LEAF_ROOM = MOST_CANDIDATES


@dataclass
class Query:
    """Tokens to run through the model behind the first `start` cached tokens of a slot.

    Chain tokens follow each other; with `leaves` all stand at position `start`, each seeing its prefix and itself.
    `embedding` replaces the embedding of the one token (Multiplex Thinking)."""

    slot: int
    start: int
    ids: list[int]
    leaves: bool = False
    embedding: torch.Tensor | None = None


@dataclass
class _Group:
    """Queries of like length, attended together as a padded block."""

    rows: slice | torch.Tensor  # the slots, of the cache
    token_BQ: torch.Tensor | None  # which of the flat tokens each place holds; None: all of them, in order
    length: int  # of the cache that any of them sees
    start_BQ: torch.Tensor
    lower_BQ: torch.Tensor
    write_BQ: torch.Tensor
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, repeats: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [B, 1, repeats * Q, L], made once a forward. `window` is that of sliding attention."""
        key = (repeats, window)
        if key not in self.masks:
            at_L = torch.arange(self.length, device=self.write_BQ.device)
            sees_BQL = (at_L < self.start_BQ[..., None]) | (
                (at_L >= self.lower_BQ[..., None]) & (at_L <= self.write_BQ[..., None])
            )
            if window is not None:
                depth_BQ = torch.where(self.lower_BQ == self.start_BQ, self.write_BQ, self.start_BQ)
                sees_BQL &= at_L > depth_BQ[..., None] - window
            mask_BQL = torch.zeros(sees_BQL.shape, dtype=dtype, device=at_L.device)
            mask_BQL.masked_fill_(~sees_BQL, torch.finfo(dtype).min)
            self.masks[key] = mask_BQL[:, None].repeat(1, 1, repeats, 1)
        return self.masks[key]


@dataclass
class _Plan:
    """One forward: where its flat tokens' keys go, and its groups. `place_T` is where each token lies among the groups'
    blocks laid end to end; None: in order."""

    slot_T: torch.Tensor
    write_T: torch.Tensor
    groups: list[_Group]
    place_T: torch.Tensor | None


def cache_shape(config: Any, count: int, length: int) -> tuple[int, ...]:
    """[layers, keys and values, slots, KV heads, positions, head]: sliding layers keep the whole context too."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, 2, count, heads, length + LEAF_ROOM, head_dim


class Slots:
    """A static KV cache of `count` slots of `length` tokens, and what token each position holds.

    Which models it can hold, `families` checks."""

    def __init__(self, model: PreTrainedModel, count: int, length: int) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.length = length
        self.device = model.device
        self.cache = torch.zeros(cache_shape(model.config, count, length), dtype=model.dtype, device=self.device)
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        #: Each layer's sliding window, as its attention last asked for it.
        self.windows: dict[int, int | None] = {}
        # Classes with kinds of layers look a mask up for each; the others make none where they are given none.
        kinds = getattr(model.config, "layer_types", None)
        self._masks = dict.fromkeys({*kinds, "full_attention"}) if kinds else None
        model.set_attn_implementation(ATTENTION)
        self._plan: _Plan | None = None

    def forward(self, queries: list[Query]) -> tuple[torch.Tensor, list[int]]:
        """Run the queries; returns the last hidden states [T, H] and where each query begins among the T.

        Chains are recorded in `tokens`; leaves are not until `keep`. A forward that fails leaves the tokens before its
        queries, and nothing that it may have written over."""
        count_B = np.array([len(query.ids) for query in queries])
        first_B = np.cumsum(count_B) - count_B
        start_B = np.array([query.start for query in queries])
        slot_B = np.array([query.slot for query in queries])
        row_T = np.repeat(np.arange(len(queries)), count_B)
        write_T = np.arange(len(row_T)) + (start_B - first_B)[row_T]
        leaves_B = np.array([query.leaves for query in queries])
        position_T = np.where(leaves_B[row_T], start_B[row_T], write_T)
        self._plan = self._lay_out(queries, first_B, slot_B, start_B, slot_B[row_T], write_T)
        ids_T = np.fromiter(chain.from_iterable(query.ids for query in queries), np.int64, len(row_T))
        embeds_TH = self.model.get_input_embeddings()(self._to_device(ids_T))
        for first, query in zip(first_B, queries, strict=True):
            if query.embedding is not None:
                embeds_TH[first] = query.embedding
        for query in queries:
            del self.tokens[query.slot][query.start :]
        hidden_TH = self.decoder(
            inputs_embeds=embeds_TH[None],
            position_ids=self._to_device(position_T)[None],
            attention_mask=self._masks,
            use_cache=False,
            slots=self,
        ).last_hidden_state[0]
        for query in queries:
            if not query.leaves:
                self.tokens[query.slot] += query.ids if query.embedding is None else [-1]
        return hidden_TH, first_B.tolist()

    def _lay_out(
        self,
        queries: list[Query],
        first_B: np.ndarray,
        slot_B: np.ndarray,
        start_B: np.ndarray,
        slot_T: np.ndarray,
        write_T: np.ndarray,
    ) -> _Plan:
        groups, place_T, laid = [], np.empty(len(write_T), np.int64), 0
        for leaves, members in _grouped(queries):
            count_M = np.array([len(queries[i].ids) for i in members])
            width, slot_M = int(count_M.max()), slot_B[members]
            span = int(slot_M[-1] - slot_M[0]) + 1
            # Rows without a gap are read in place. A few idle slots among decode steps cost less than copying the
            # others.
            in_place = span == len(slot_M) or (width == 1 and span <= 2 * len(slot_M))
            row_M = slot_M - slot_M[0] if in_place else np.arange(len(slot_M))
            # Places without a token see their slot's first key.
            blocks = np.zeros((3, int(row_M[-1]) + 1, width), np.int64)
            token_BQ, start_BQ, write_BQ = blocks
            real_MQ = np.arange(width) < count_M[:, None]
            token_MQ = np.where(real_MQ, first_B[members][:, None] + np.arange(width), 0)
            token_BQ[row_M] = token_MQ
            start_BQ[row_M] = start_B[members][:, None]
            write_BQ[row_M] = np.where(real_MQ, write_T[token_MQ], 0)
            place_T[token_MQ[real_MQ]] = (laid + row_M[:, None] * width + np.arange(width))[real_MQ]
            start, write = self._to_device(start_BQ), self._to_device(write_BQ)
            groups.append(
                _Group(
                    rows=slice(int(slot_M[0]), int(slot_M[0]) + span) if in_place else self._to_device(slot_M),
                    token_BQ=self._to_device(token_BQ),
                    length=int(write_BQ.max()) + 1,
                    start_BQ=start,
                    lower_BQ=write if leaves else start,
                    write_BQ=write,
                )
            )
            laid += token_BQ.size
        # One group without gaps, in order: most decode steps. Nothing has to be moved then.
        if len(groups) == 1 and laid == len(place_T) and bool((place_T == np.arange(laid)).all()):
            groups[0].token_BQ = None
            return _Plan(self._to_device(slot_T), self._to_device(write_T), groups, None)
        return _Plan(self._to_device(slot_T), self._to_device(write_T), groups, self._to_device(place_T))

    def copy(self, source: int, slot: int, length: int) -> None:
        """Make the first `length` tokens of slot `source` those of `slot`, with their keys and values."""
        self.cache[:, :, slot, :, :length] = self.cache[:, :, source, :, :length]
        self.tokens[slot] = self.tokens[source][:length]

    def keep(self, kept: list[tuple[Query, int]]) -> None:
        """Make one leaf of each query the next token of its slot: its keys and values move behind the prefix."""
        for query, leaf in kept:
            if leaf > 0:
                self.cache[:, :, query.slot, :, query.start] = self.cache[:, :, query.slot, :, query.start + leaf]
            self.tokens[query.slot].append(query.ids[leaf])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> torch.Tensor:
        """Write the new keys and values [1, heads, T, D], attend group by group; returns [1, T, heads, D]."""
        assert self._plan is not None
        self.windows[layer] = window
        keys, values = self.cache[layer, 0], self.cache[layer, 1]
        plan = self._plan
        keys[plan.slot_T, :, plan.write_T] = key[0].transpose(0, 1)
        values[plan.slot_T, :, plan.write_T] = value[0].transpose(0, 1)
        heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
        repeats = heads // kv_heads
        out = []
        for group in plan.groups:
            size, width = group.write_BQ.shape
            # Grouped-query attention: the query heads that share keys become more queries of the same row.
            q = query[0] if group.token_BQ is None else query[0][:, group.token_BQ.flatten()]
            q = q.reshape(kv_heads, repeats, size, width, dim).permute(2, 0, 1, 3, 4).flatten(2, 3)
            k, v = keys[group.rows, :, : group.length], values[group.rows, :, : group.length]
            mask = group.mask(repeats, window, query.dtype)
            if cap is None:
                o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            else:
                o = capped_attention(q, k, v, mask, scale, cap)
            o = o.unflatten(2, (repeats, width)).permute(0, 3, 1, 2, 4)
            out.append(o.reshape(-1, heads, dim))
        laid = out[0] if len(out) == 1 else torch.cat(out)
        return (laid if plan.place_T is None else laid[plan.place_T])[None]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _grouped(queries: list[Query]) -> list[tuple[bool, list[int]]]:
    """Whether they are leaves, and the indices, of queries of like length (powers of two), in order of slot."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, query in enumerate(queries):
        n = len(query.ids)
        groups.setdefault((n if query.leaves else n.bit_length(), query.leaves), []).append(i)
    return [(leaves, sorted(members, key=lambda i: queries[i].slot)) for (_, leaves), members in groups.items()]


def _attend(slots: Slots, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return slots.attend(layer.number, query, key, value, layer.scale, layer.window, layer.cap)


register(ATTENTION, "slots", _attend)
