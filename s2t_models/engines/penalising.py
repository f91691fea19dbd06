"""Penalties on tokens that are there already, for a batch of rows at once.

They bear on the few logits of a row whose tokens are in its text; the others are not touched. Axes: _B row,
_V vocabulary, _N token of a row's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch

from s2t_models.engines.contract import Penalties

#: No penalty takes a logit further than this, so that the differences of any two are numbers.
_FAR = 1e30


class Repeats:
    """The tokens that penalties bear on at the next step of a decode, and how often each was written."""

    def __init__(self, penalties: Penalties, prefix: Sequence[int], first_step: int) -> None:
        """The output began `first_step` tokens before the end of the prefix."""
        self.penalties = penalties
        began = len(prefix) - first_step
        # What was only read concerns the repetition penalty alone.
        self.times = dict.fromkeys(prefix[:began], 0) if penalties.repetition != 1.0 else {}
        for token in prefix[began:]:
            self.add(token)

    def add(self, token: int) -> None:
        """A token was written."""
        self.times[token] = self.times.get(token, 0) + 1


def penalised(logits_BV: torch.Tensor, repeats: Mapping[int, Repeats]) -> torch.Tensor:
    """The logits to pick from, [B, V]: those of the rows in `repeats` with their penalties, in float32; the tensor
    itself where there are no such rows."""
    if not repeats:
        return logits_BV
    times = [one.times for one in repeats.values()]
    count_B = [len(each) for each in times]
    row_N = np.repeat(list(repeats), count_B)
    id_N = np.fromiter(chain.from_iterable(times), np.int64, len(row_N))
    times_N = np.fromiter(chain.from_iterable(each.values() for each in times), np.int64, len(row_N))
    asked = [(one.penalties.presence, one.penalties.frequency, one.penalties.repetition) for one in repeats.values()]
    presence_N, frequency_N, repetition_N = np.repeat(np.array(asked), count_B, axis=0).T.copy()
    off_N = presence_N * (times_N > 0) + frequency_N * times_N
    rows, ids, repetition, off = (
        torch.from_numpy(column_N).to(logits_BV.device) for column_N in (row_N, id_N, repetition_N, off_N)
    )
    own = logits_BV[rows, ids].double()
    changed = torch.where(own > 0, own / repetition, own * repetition) - off
    changed = torch.where(own.isneginf(), own, changed.clamp(-_FAR, _FAR))
    penalised_BV = logits_BV.to(torch.float32, copy=True)
    penalised_BV[rows, ids] = changed.float()
    return penalised_BV
