"""The torch engine's cache and its one primitive forward.

Slots are the rows of a static KV cache, each at its own position. A forward takes any mix of queries, each some tokens
for one slot: a decode step (1 token), a prompt or a draft to verify (a chain of tokens), or a fan of K candidate leaves
(each seeing its prefix and itself). Queries are packed into one flat row of tokens, so that linear layers do no work for
padding between a decode step and a fan; attention runs once per group of queries of like length. transformers' own
modelling code does the rest: any model whose attention goes through its attention interface is served.

Axes: _T flat token, _B query of a group, _Q token of a query, _L cache position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "s2t_slots"
#: Cache columns past the context where leaves are written before one of them is kept.
LEAF_ROOM = 64


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
    rows: slice | torch.Tensor
    span: slice  # of the flat tokens, dense [B, Q]
    queries: int
    length: int
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


class Slots:
    """A static KV cache of `count` slots of `length` tokens, and what token each position holds.

    Raises ValueError for models whose attention this cache cannot express (logit soft-capping, attention sinks)."""

    def __init__(self, model: PreTrainedModel, count: int, length: int) -> None:
        config: Any = model.config
        if getattr(config, "attn_logit_softcapping", None):
            raise ValueError(
                f"{config.model_type}: attention with logit soft-capping is not supported by the torch engine"
            )
        self.model = model
        self.length = length
        self.device = model.device
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # One slot more than asked for: padding writes there.
        shape = (config.num_hidden_layers, 2, count + 1, heads, length + LEAF_ROOM, head_dim)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=self.device)
        self.scratch = count
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        self._masks = dict.fromkeys(layers | {"full_attention"})
        model.set_attn_implementation(ATTENTION)
        self._groups: list[_Group] = []
        self._write_T: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, queries: list[Query]) -> tuple[torch.Tensor, list[int]]:
        """Run the queries; returns the last hidden states [T, H] and where each query begins among the T.

        Chains are recorded in `tokens`; leaves are not until `keep`."""
        firsts = [0] * len(queries)
        ids_T: list[np.ndarray] = []
        positions_T: list[np.ndarray] = []
        slot_T: list[np.ndarray] = []
        write_T: list[np.ndarray] = []
        self._groups = []
        begin = 0
        for members in _grouped(queries):
            width = max(len(queries[i].ids) for i in members)
            slots = np.array([queries[i].slot for i in members])
            span = int(slots[-1] - slots[0]) + 1
            # Rows without a gap are read in place. A few idle slots among decode steps cost less than copying the others.
            in_place = span == len(slots) or (width == 1 and span <= 2 * len(slots))
            rows = slots - slots[0] if in_place else np.arange(len(slots))
            blocks = np.zeros(
                (6, int(rows[-1]) + 1, width), dtype=np.int64
            )  # ids, positions, slots, write, start, lower
            blocks[2] = self.scratch
            for row, i in zip(rows, members, strict=True):
                query, n = queries[i], len(queries[i].ids)
                firsts[i] = begin + int(row) * width
                at_Q = np.arange(query.start, query.start + n)
                blocks[0, row, :n] = query.ids
                blocks[1, row, :n] = query.start if query.leaves else at_Q
                blocks[2, row, :n] = query.slot
                blocks[3, row, :n] = at_Q
                blocks[4, row, :n] = query.start
                blocks[5, row, :n] = at_Q if query.leaves else query.start
            size = blocks[0].size
            for gathered, block in zip((ids_T, positions_T, slot_T, write_T), blocks[:4], strict=True):
                gathered.append(block.reshape(-1))
            start_BQ, lower_BQ, write_BQ = (self._to_device(blocks[k]) for k in (4, 5, 3))
            self._groups.append(
                _Group(
                    rows=slice(int(slots[0]), int(slots[0]) + span) if in_place else self._to_device(slots),
                    span=slice(begin, begin + size),
                    queries=width,
                    length=int(blocks[3].max()) + 1,
                    start_BQ=start_BQ,
                    lower_BQ=lower_BQ,
                    write_BQ=write_BQ,
                )
            )
            begin += size
        self._write_T = self._to_device(np.concatenate(slot_T)), self._to_device(np.concatenate(write_T))
        embeds_TH = self.model.get_input_embeddings()(self._to_device(np.concatenate(ids_T)))
        for first, query in zip(firsts, queries, strict=True):
            if query.embedding is not None:
                embeds_TH[first] = query.embedding
        hidden_TH = self.model.base_model(
            inputs_embeds=embeds_TH[None],
            position_ids=self._to_device(np.concatenate(positions_T))[None],
            attention_mask=self._masks,
            use_cache=False,
            slots=self,
        ).last_hidden_state[0]
        for query in queries:
            if not query.leaves:
                known = query.ids if query.embedding is None else [-1]
                self.tokens[query.slot][query.start :] = known
        return hidden_TH, firsts

    def keep(self, kept: list[tuple[Query, int]]) -> None:
        """Make one leaf of each query the next token of its slot: its keys and values move behind the prefix."""
        moved = [(query.slot, query.start, query.start + leaf) for query, leaf in kept if leaf > 0]
        if moved:
            slot, to, source = (torch.tensor(column, device=self.device) for column in zip(*moved, strict=True))
            self.cache[:, :, slot, :, to] = self.cache[:, :, slot, :, source]
        for query, leaf in kept:
            self.tokens[query.slot][query.start :] = [query.ids[leaf]]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        """Write the new keys and values [1, heads, T, D], attend group by group; returns [1, T, heads, D]."""
        assert self._write_T is not None
        keys, values = self.cache[layer]
        slot_T, write_T = self._write_T
        keys[slot_T, :, write_T] = key[0].transpose(0, 1)
        values[slot_T, :, write_T] = value[0].transpose(0, 1)
        heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
        repeats = heads // kv_heads
        out = []
        for group in self._groups:
            # Grouped-query attention: the query heads that share keys become more queries of the same row.
            q = query[0, :, group.span].reshape(kv_heads, repeats, -1, group.queries, dim)
            q = q.permute(2, 0, 1, 3, 4).flatten(2, 3)
            k, v = keys[group.rows, :, : group.length], values[group.rows, :, : group.length]
            mask = group.mask(repeats, window, query.dtype)
            o = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            o = o.unflatten(2, (repeats, group.queries)).permute(0, 3, 1, 2, 4)
            out.append(o.reshape(-1, heads, dim))
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def _grouped(queries: list[Query]) -> list[list[int]]:
    """Indices of queries of like length (powers of two), each group in order of slot."""
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, query in enumerate(queries):
        n = len(query.ids)
        groups.setdefault((n, True) if query.leaves or n == 1 else (n.bit_length(), False), []).append(i)
    return [sorted(members, key=lambda i: queries[i].slot) for members in groups.values()]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    slots: Slots | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if slots is None or s_aux is not None:
        raise ValueError("this model's attention is not supported by the torch engine")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return slots.attend(int(module.layer_idx), query, key, value, scale, sliding_window), None  # type: ignore[arg-type]


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


_register()
