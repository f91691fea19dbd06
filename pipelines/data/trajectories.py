"""The trajectories of a collection for training, made from its shards when they are asked for.

Shards are memory-mapped: the rows stay on the disk and in the kernel's page cache, which all workers of a node share,
and a trajectory is a view of them. So any order costs the same, and no worker's memory grows with the collection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import pyarrow as pa

from pipelines.data.shards import each_shard
from s2t_models.storage import Location
from s2t_models.training.batches import NO_CANDIDATE, Trajectory
from s2t_models.training.tree import Tree


class ShardTrajectories(Sequence[Trajectory]):
    """Those rows of a collection that hold an output token and no error, in order: what `batches.trajectories` makes of
    all rows at once. Checksums are left to whoever begins the training. Raises ShardError as `read_shards` does."""

    def __init__(self, collection: Location) -> None:
        self._parts = [
            _Part(batch) for table in each_shard(collection, mapped=True, check=False) for batch in table.to_batches()
        ]
        self._starts = np.cumsum([0, *(len(part.rows) for part in self._parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, place: int) -> Trajectory: ...
    @overload
    def __getitem__(self, place: slice) -> list[Trajectory]: ...
    def __getitem__(self, place: int | slice) -> Trajectory | list[Trajectory]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        part = self._parts[number]
        return part.trajectory(int(part.rows[place - self._starts[number]]))

    def __iter__(self) -> Iterator[Trajectory]:
        for part in self._parts:
            yield from (part.trajectory(int(row)) for row in part.rows)


class _Part:
    """One record batch as views of its columns. `rows` are those that are trajectories."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        names = ("prompt_ids", "output_ids", "kl_T", "entropy_T", "teacher_argmax_T")
        self._lists = {name: _List(batch[name]) for name in names}
        self._uids, self._prompts = batch["uid"], batch["prompt"]
        kept = batch["kept"]
        self._kept = np.asarray(kept.offsets)
        steps = kept.values
        self._step, self._by_kl = (np.asarray(steps.field(name).to_numpy(zero_copy_only=False)) for name in _FLAT)
        self._candidates = {name: _List(steps.field(name)) for name in _CANDIDATES}
        is_whole = np.asarray(batch["error"].is_null().to_numpy(zero_copy_only=False))
        self.rows = np.flatnonzero(is_whole & (self._lists["output_ids"].lengths > 0))

    def trajectory(self, row: int) -> Trajectory:
        prompt, output = self._lists["prompt_ids"][row], self._lists["output_ids"][row]
        groups = range(self._kept[row], self._kept[row + 1])
        candidates = {name: column.padded(groups, filler) for (name, filler), column in self._columns()}
        tree = Tree(
            tokens=np.concatenate([prompt, output]).astype(np.int64),
            prompt=len(prompt),
            prefixes_G=len(prompt) + self._step[groups.start : groups.stop].astype(np.int64),
            candidates_GK=candidates["candidates_K"].astype(np.int64),
        )
        return Trajectory(
            uid=self._uids[row].as_py(),
            prompt=self._prompts[row].as_py(),
            tree=tree,
            kl_T=np.array(self._lists["kl_T"][row]),
            entropy_T=np.array(self._lists["entropy_T"][row]),
            teacher_T=self._lists["teacher_argmax_T"][row].astype(np.int64),
            by_kl_G=np.array(self._by_kl[groups.start : groups.stop], dtype=bool),
            teacher_logprobs_GK=candidates["teacher_logprobs_K"],
        )

    def _columns(self) -> Iterator[tuple[tuple[str, float], _List]]:
        return zip(_CANDIDATES.items(), self._candidates.values(), strict=True)


#: The fields of a kept step: plain ones, and lists with what fills them up.
_FLAT = ("step", "by_kl")
_CANDIDATES = {"candidates_K": -1, "teacher_logprobs_K": NO_CANDIDATE}


class _List:
    """A column of lists of numbers."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets = np.asarray(column.offsets)
        self.values = column.values.to_numpy()
        self.lengths = np.diff(self.offsets)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def padded(self, rows: range, filler: float) -> np.ndarray:
        """Some lists as the rows of an array, as wide as the longest."""
        lengths = self.lengths[rows.start : rows.stop]
        width = int(lengths.max(initial=0)) if len(rows) else 1
        values = self.values[self.offsets[rows.start] : self.offsets[rows.stop]]
        out = np.full((len(rows), width), filler, self.values.dtype)
        out[np.arange(width) < lengths[:, None]] = values
        return out
