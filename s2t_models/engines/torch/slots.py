"""The torch engine's cache and its one primitive forward.

Slots are the rows of a static KV cache, each at its own position. A forward takes any mix of queries, each some tokens
for one slot: a decode step (1 token), a prompt or a draft to verify (a chain of tokens), or a fan of K candidate leaves
(each seeing its prefix and itself). Queries are packed into one flat row of tokens, so that linear layers do no work
for padding between a decode step and a fan; attention runs once per group of queries of like length. transformers' own
modelling code does the rest, for any model whose attention goes through its attention interface.

The second pass of a hard token (Think-at-Hard) is a query of its own: its keys lie past the context, beside those of
the first pass, and its LoRA acts on its tokens alone.

Axes: _T flat token, _B query of a group, _Q token of a query, _L cache position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from s2t_models.engines.torch.attention import Layer, capped_attention, register
from s2t_models.settings import MOST_CANDIDATES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2t_models.second_pass import Gate

ATTENTION = "s2t_slots"
_Kind = Literal["chain", "leaves", "second"]
#: Cache columns past the context where leaves are written before one of them is kept.
LEAF_ROOM = MOST_CANDIDATES


@dataclass
class Query:
    """Tokens to run through the model behind the first `start` cached tokens of a slot.

    Chain tokens follow each other; with `leaves` all stand at position `start`, each seeing its prefix and itself.
    `embedding` replaces the embedding of the one token (Multiplex Thinking). With `second`, the one token is the second
    pass of the one at position `start`, which is cached: it sees that one, what stands before it, and the second passes
    at the positions `second`, of which the last is its own and the others were run for the same decode."""

    slot: int
    start: int
    ids: list[int]
    leaves: bool = False
    embedding: torch.Tensor | None = None
    second: list[int] | None = None


@dataclass
class _Group:
    """Queries of like length and kind, attended together as a padded block. In its columns the keys of second passes,
    of which any of them sees up to `seconds` at the positions `second_BL`, follow those of the first pass."""

    rows: slice | torch.Tensor  # the slots, of the cache
    token_BQ: torch.Tensor | None  # which of the flat tokens each place holds; None: all of them, in order
    length: int  # of the cache of the first pass that any of them sees
    start_BQ: torch.Tensor
    lower_BQ: torch.Tensor
    write_BQ: torch.Tensor
    seconds: int = 0
    second_BL: torch.Tensor | None = None
    masks: dict[tuple[int, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, repeats: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [B, 1, repeats * Q, L], made once a forward. `window` is that of sliding attention."""
        key = (repeats, window)
        if key not in self.masks:
            at_L = torch.arange(self.length + self.seconds, device=self.write_BQ.device)
            sees_BQL = (at_L < self.start_BQ[..., None]) | (
                (at_L >= self.lower_BQ[..., None]) & (at_L <= self.write_BQ[..., None])
            )
            if window is not None and self.second_BL is not None:
                position_BL = torch.cat([at_L[: self.length].expand(len(self.second_BL), -1), self.second_BL], dim=1)
                sees_BQL &= position_BL[:, None] >= self.start_BQ[..., None] - window
            elif window is not None:
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


def cache_shape(config: Any, count: int, length: int, second: bool = False) -> tuple[int, ...]:
    """[layers, keys and values, slots, KV heads, positions, head]: sliding layers keep the whole context too. With
    `second` there is room for a second pass of every token."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = length + LEAF_ROOM + (length if second else 0)
    return config.num_hidden_layers, 2, count, heads, positions, head_dim


class Slots:
    """A static KV cache of `count` slots of `length` tokens, and what token each position holds; with `second`, with
    room for second passes, whose LoRA `gate` lets act on them alone.

    Which models it can hold, `families` checks."""

    gate: Gate | None = None

    def __init__(self, model: PreTrainedModel, count: int, length: int, second: bool = False) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.length = length
        self.device = model.device
        self.cache = torch.zeros(
            cache_shape(model.config, count, length, second), dtype=model.dtype, device=self.device
        )
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        #: Each layer's sliding window, as its attention last asked for it.
        self.windows: dict[int, int | None] = {}
        # Classes with kinds of layers look a mask up for each; the others make none where they are given none.
        kinds = getattr(model.config, "layer_types", None)
        self._masks = dict.fromkeys({*kinds, "full_attention"}) if kinds else None
        model.set_attn_implementation(ATTENTION)
        self._plan: _Plan | None = None

    def forward(
        self, queries: list[Query], layers: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor, list[int], torch.Tensor | None]:
        """Run the queries; returns the last hidden states [T, H], where each query begins among the T, and, where
        `layers` are asked for, the hidden states after these (0: the embeddings) laid end to end, [T, F].

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
        second_T = first_B[[query.second is not None for query in queries]]
        write_T[second_T] = [self.length + LEAF_ROOM + len(query.second) - 1 for query in queries if query.second]
        self._plan = self._lay_out(queries, first_B, slot_B, start_B, slot_B[row_T], write_T)
        ids_T = np.fromiter(chain.from_iterable(query.ids for query in queries), np.int64, len(row_T))
        embeds_TH = self.model.get_input_embeddings()(self._to_device(ids_T))
        for first, query in zip(first_B, queries, strict=True):
            if query.embedding is not None:
                embeds_TH[first] = query.embedding
        for query in queries:
            if query.second is None:
                del self.tokens[query.slot][query.start :]
        if self.gate is not None:
            self.gate.open(self._to_device(np.isin(np.arange(len(row_T)), second_T))[None] if len(second_T) else None)
        output = self.decoder(
            inputs_embeds=embeds_TH[None],
            position_ids=self._to_device(position_T)[None],
            attention_mask=self._masks,
            use_cache=False,
            slots=self,
            output_hidden_states=bool(layers),
        )
        for query in queries:
            if not query.leaves and query.second is None:
                self.tokens[query.slot] += query.ids if query.embedding is None else [-1]
        states_TF = torch.cat([output.hidden_states[layer][0] for layer in layers], dim=-1) if layers else None
        return output.last_hidden_state[0], first_B.tolist(), states_TF

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
        for kind, members in _grouped(queries):
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
            rows = slice(int(slot_M[0]), int(slot_M[0]) + span) if in_place else self._to_device(slot_M)
            token = self._to_device(token_BQ)
            if kind == "second":
                start_BQ[row_M] += 1  # it sees its own first pass
                groups.append(self._seconds(rows, token, start_BQ, row_M, [queries[i].second or [] for i in members]))
            else:
                start, write = self._to_device(start_BQ), self._to_device(write_BQ)
                lower = write if kind == "leaves" else start
                groups.append(_Group(rows, token, int(write_BQ.max()) + 1, start, lower, write))
            laid += token_BQ.size
        # One group without gaps, in order: most decode steps. Nothing has to be moved then.
        if len(groups) == 1 and laid == len(place_T) and bool((place_T == np.arange(laid)).all()):
            groups[0].token_BQ = None
            return _Plan(self._to_device(slot_T), self._to_device(write_T), groups, None)
        return _Plan(self._to_device(slot_T), self._to_device(write_T), groups, self._to_device(place_T))

    def _seconds(
        self,
        rows: slice | torch.Tensor,
        token: torch.Tensor,
        start_BQ: np.ndarray,
        row_M: np.ndarray,
        second_M: list[list[int]],
    ) -> _Group:
        """The group of some second passes, one token a row: the keys of these lie behind those of the first pass."""
        length, seconds = int(start_BQ.max()), max(map(len, second_M))
        write_BQ, second_BL = np.full_like(start_BQ, length), np.zeros((len(start_BQ), seconds), np.int64)
        for row, second in zip(row_M, second_M, strict=True):
            write_BQ[row] += len(second) - 1
            second_BL[row, : len(second)] = second
        start, write = self._to_device(start_BQ), self._to_device(write_BQ)
        lower = torch.full_like(start, length)
        return _Group(rows, token, length, start, lower, write, seconds, self._to_device(second_BL))

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
            k, v = (self._seen(cached, group) for cached in (keys, values))
            mask = group.mask(repeats, window, query.dtype)
            if cap is None:
                o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            else:
                o = capped_attention(q, k, v, mask, scale, cap)
            o = o.unflatten(2, (repeats, width)).permute(0, 3, 1, 2, 4)
            out.append(o.reshape(-1, heads, dim))
        laid = out[0] if len(out) == 1 else torch.cat(out)
        return (laid if plan.place_T is None else laid[plan.place_T])[None]

    def _seen(self, cached: torch.Tensor, group: _Group) -> torch.Tensor:
        """The columns of a layer's keys or values that a group sees."""
        first = cached[group.rows, :, : group.length]
        if not group.seconds:
            return first
        begin = self.length + LEAF_ROOM
        return torch.cat([first, cached[group.rows, :, begin : begin + group.seconds]], dim=2)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _grouped(queries: list[Query]) -> list[tuple[_Kind, list[int]]]:
    """The kind and the indices of queries of one kind and of like length (powers of two), in order of slot."""
    groups: dict[tuple[int, _Kind], list[int]] = {}
    for i, query in enumerate(queries):
        n = len(query.ids)
        kind: _Kind = "leaves" if query.leaves else "chain" if query.second is None else "second"
        groups.setdefault((n if query.leaves else n.bit_length(), kind), []).append(i)
    return [(kind, sorted(members, key=lambda i: queries[i].slot)) for (_, kind), members in groups.items()]


def _attend(slots: Slots, layer: Layer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return slots.attend(layer.number, query, key, value, layer.scale, layer.window, layer.cap)


register(ATTENTION, "slots", _attend)
