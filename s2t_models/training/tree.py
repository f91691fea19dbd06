"""A trajectory once, and all its candidate leaves behind it, in one forward under a tree mask.

A leaf is one candidate token c at a state s_t: it sees its prefix and itself, and its position is the prefix's length,
so its hidden state equals that of a forward over s_t + c alone. That costs one forward a trajectory instead of a copy
of the prefix per candidate. What a token sees is decided where each layer attends (`tree_attention`). The module knows
nothing of losses, labels or reserved rows.

Axes: _B tree in a batch, _L packed token, _S state (a prefix length to decode from), _G group (a triggered step),
_K candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from s2t_models.training.tree_attention import Sight


@dataclass(frozen=True)
class Tree:
    """One trajectory: `tokens` (prompt + output), of which the first `prompt` are the prompt's; for each group the
    length of its prefix and its candidates, padded with -1."""

    tokens: np.ndarray  # [N] int
    prompt: int
    prefixes_G: np.ndarray  # [G] int, each in 1..N
    candidates_GK: np.ndarray  # [G, K] int, -1 where a group has fewer candidates

    @property
    def length(self) -> int:
        """How many tokens the packed tree has."""
        return len(self.tokens) + int((self.candidates_GK >= 0).sum())


@dataclass(frozen=True)
class TreeBatch:
    """Packed trees, padded to one length.

    A token sees the first `seen_BL` tokens of its row, and itself. `(row_S, column_S)` is where every output step's
    decoding state lies (the position whose logits are p(. | s_t)), trajectory after trajectory; `state_G` each group's
    state as an index into those; `(row_G, leaf_GK)` where each candidate's leaf lies, valid where `valid_GK`. The first
    `trunk` columns hold all trajectory tokens.
    """

    ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    seen_BL: torch.Tensor
    row_S: torch.Tensor
    column_S: torch.Tensor
    state_G: torch.Tensor
    row_G: torch.Tensor
    leaf_GK: torch.Tensor
    valid_GK: torch.Tensor
    trunk: int

    def to(self, device: torch.device | str) -> TreeBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)

    def inputs(self, leaves: bool = True) -> dict[str, Any]:
        """The arguments of `tree_attention.decode`; without `leaves`, for the trajectories alone."""
        end = self.ids_BL.shape[1] if leaves else self.trunk
        positions_BL = self.positions_BL[:, :end]
        return {
            "input_ids": self.ids_BL[:, :end],
            "position_ids": positions_BL,
            "sight": Sight(self.seen_BL[:, :end], positions_BL),
        }

    def states(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """The decoding states' hidden states, [S, H]."""
        return hidden_BLH[self.row_S, self.column_S]

    @property
    def written_S(self) -> torch.Tensor:
        """The token that the text has at each decoding state, [S]."""
        return self.ids_BL[self.row_S, self.column_S + 1]

    def leaves(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """The candidate leaves' hidden states, [G, K, H]; meaningless where not `valid_GK`."""
        return hidden_BLH[self.row_G[:, None], self.leaf_GK]


def pack(trees: Sequence[Tree]) -> TreeBatch:
    """Pack a batch of trees; where trees have different numbers of candidates, groups are padded to the largest."""
    rows, length = len(trees), max(tree.length for tree in trees)
    width = max(tree.candidates_GK.shape[1] for tree in trees)
    groups = sum(len(tree.prefixes_G) for tree in trees)
    ids_BL = np.zeros((rows, length), dtype=np.int64)
    positions_BL = np.zeros((rows, length), dtype=np.int64)
    seen_BL = np.zeros((rows, length), dtype=np.int64)
    leaf_GK = np.zeros((groups, width), dtype=np.int64)
    valid_GK = np.zeros((groups, width), dtype=bool)
    row_S, column_S, state_G, row_G = [], [], [], []
    first_group = first_state = 0
    for row, tree in enumerate(trees):
        tokens, group = len(tree.tokens), slice(first_group, first_group + len(tree.prefixes_G))
        valid = tree.candidates_GK >= 0
        prefixes = np.broadcast_to(tree.prefixes_G[:, None], valid.shape)[valid]
        end = tokens + len(prefixes)
        ids_BL[row, :tokens] = tree.tokens
        ids_BL[row, tokens:end] = tree.candidates_GK[valid]
        positions_BL[row, :tokens] = np.arange(tokens)
        positions_BL[row, tokens:end] = prefixes
        seen_BL[row, :tokens] = np.arange(1, tokens + 1)
        seen_BL[row, tokens:end] = prefixes
        valid_GK[group, : valid.shape[1]] = valid
        leaf_GK[group][valid_GK[group]] = np.arange(tokens, end)
        column_S.append(np.arange(tree.prompt - 1, tokens - 1))
        row_S.append(np.full(tokens - tree.prompt, row))
        row_G.append(np.full(len(tree.prefixes_G), row))
        state_G.append(first_state + tree.prefixes_G - tree.prompt)
        first_group, first_state = group.stop, first_state + tokens - tree.prompt
    return TreeBatch(
        ids_BL=torch.from_numpy(ids_BL),
        positions_BL=torch.from_numpy(positions_BL),
        seen_BL=torch.from_numpy(seen_BL),
        row_S=_joined(row_S),
        column_S=_joined(column_S),
        state_G=_joined(state_G),
        row_G=_joined(row_G),
        leaf_GK=torch.from_numpy(leaf_GK),
        valid_GK=torch.from_numpy(valid_GK),
        trunk=max(len(tree.tokens) for tree in trees),
    )


def _joined(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
