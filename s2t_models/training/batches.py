"""From labelled rows to training batches: trajectories with their groups, the split by prompt, and the order of
batches.

Everything here is a pure function of the rows and a seed, so every worker, and a worker that starts again, sees the
same trajectories and the same batches. It knows nothing of models or of how rows are stored.

Axes: _T output step, _G group (a kept step), _K candidate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch

from s2t_models.training import losses
from s2t_models.training.tree import Tree, TreeBatch, pack

#: Batches are made of trajectories of like length: this many batches at a time are drawn at random, then sorted.
POOL = 16
NO_CANDIDATE = -1e9


@dataclass(frozen=True)
class Trajectory:
    """One labelled row. `tree` holds tokens and candidates; `by_kl_G` says which groups are top steps by KL; divergence
    and entropy of each step are in nats, and `teacher_T` is what the teacher would write there."""

    uid: str
    prompt: str
    tree: Tree
    kl_T: np.ndarray
    entropy_T: np.ndarray
    teacher_T: np.ndarray
    by_kl_G: np.ndarray
    teacher_logprobs_GK: np.ndarray

    @property
    def steps(self) -> int:
        """How many tokens the output has."""
        return len(self.tree.tokens) - self.tree.prompt

    def with_groups(self, chosen_G: np.ndarray) -> Trajectory:
        """The trajectory with the groups of a boolean mask alone."""
        tree = replace(
            self.tree, prefixes_G=self.tree.prefixes_G[chosen_G], candidates_GK=self.tree.candidates_GK[chosen_G]
        )
        return replace(
            self,
            tree=tree,
            by_kl_G=self.by_kl_G[chosen_G],
            teacher_logprobs_GK=self.teacher_logprobs_GK[chosen_G],
        )


def trajectories(rows: Iterable[Mapping[str, Any]]) -> list[Trajectory]:
    """The rows of a collection (columns as in a shard) with at least one output token, in order; rows with an error are
    left out."""
    return [_trajectory(row) for row in rows if row.get("error") is None and row["output_ids"]]


def _trajectory(row: Mapping[str, Any]) -> Trajectory:
    kept, prompt = row["kept"], len(row["prompt_ids"])
    width = max((len(step["candidates_K"]) for step in kept), default=1)

    def padded(key: str, filler: float, kind: type) -> np.ndarray:
        out: np.ndarray = np.full((len(kept), width), filler, dtype=kind)
        for group, step in enumerate(kept):
            out[group, : len(step[key])] = step[key]
        return out

    tree = Tree(
        tokens=np.array(row["prompt_ids"] + row["output_ids"], dtype=np.int64),
        prompt=prompt,
        prefixes_G=np.array([prompt + step["step"] for step in kept], dtype=np.int64),
        candidates_GK=padded("candidates_K", -1, np.int64),
    )
    return Trajectory(
        uid=row["uid"],
        prompt=row["prompt"],
        tree=tree,
        kl_T=np.array(row["kl_T"], dtype=np.float32),
        entropy_T=np.array(row["entropy_T"], dtype=np.float32),
        teacher_T=np.array(row["teacher_argmax_T"], dtype=np.int64),
        by_kl_G=np.array([step["by_kl"] for step in kept], dtype=bool),
        teacher_logprobs_GK=padded("teacher_logprobs_K", NO_CANDIDATE, np.float32),
    )


class Selected(Sequence[Trajectory]):
    """Some of the trajectories of `data`, by their places there, each as `change` makes it; made when it is asked
    for."""

    def __init__(
        self,
        data: Sequence[Trajectory],
        places: Sequence[int],
        change: Callable[[Trajectory], Trajectory] = lambda item: item,
    ) -> None:
        self._data, self._places, self._change = data, places, change

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> Trajectory: ...
    @overload
    def __getitem__(self, place: slice) -> Selected: ...
    def __getitem__(self, place: int | slice) -> Trajectory | Selected:
        if isinstance(place, slice):
            return Selected(self._data, self._places[place], self._change)
        return self._change(self._data[self._places[place]])

    def at(self, places: Iterable[int]) -> Selected:
        """Those at some places of this one."""
        return Selected(self._data, [self._places[place] for place in places], self._change)

    def changed(self, change: Callable[[Trajectory], Trajectory]) -> Selected:
        """The same trajectories, each as `change` makes it."""
        return Selected(self._data, self._places, change)


def split_by_prompt(data: Sequence[Trajectory], share: float, seed: int) -> tuple[Selected, Selected]:
    """(training, validation): all trajectories of a prompt are on one side, `share` of the prompts on the second.

    Who goes where depends on prompt text and seed alone, not on the order of rows.
    """
    keys = [hashlib.sha256(f"{seed}:{item.prompt}".encode()).digest() for item in data]
    prompts = sorted(set(keys))
    held_out = set(prompts[: max(1, round(share * len(prompts)))])
    training = [place for place, key in enumerate(keys) if key not in held_out]
    return Selected(data, training), Selected(data, [place for place, key in enumerate(keys) if key in held_out])


def drop_narrow_margins(item: Trajectory, min_margin: float) -> Trajectory:
    """The trajectory without the groups whose teacher margin p(best) - p(second) is below `min_margin` (D.4, mode
    drop)."""
    ordered_GK = np.sort(np.exp(item.teacher_logprobs_GK), axis=1)
    second_G = ordered_GK[:, -2] if ordered_GK.shape[1] > 1 else 0.0
    return item.with_groups(ordered_GK[:, -1] - second_G >= min_margin)


class BatchOrder:
    """Which trajectories make up the batch of a step: every one at most once an epoch (what fills no batch is left
    out), in batches of like length (little padding), shuffled; the same for the same seed whoever asks."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch, self.seed = batch, seed
        self.per_epoch = max(len(self.lengths) // batch, 1)
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the batch of `step` (from 0), longest first."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._make(epoch)
        return self._batches[place]

    def _make(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = np.resize(rng.permutation(len(self.lengths)), max(len(self.lengths), self.batch))
        shuffled = shuffled[: self.per_epoch * self.batch]
        batches: list[np.ndarray] = []
        for start in range(0, len(shuffled), POOL * self.batch):
            pool = shuffled[start : start + POOL * self.batch]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.batch)
        return [batches[i] for i in rng.permutation(len(batches))]


def pieces(lengths: Sequence[int], limit: int) -> Iterator[slice]:
    """Cut a list of packed lengths into runs of at most `limit` tokens each, padding counted; one that is longer alone
    is a run of its own."""
    start = longest = 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        if end > start and longest * (end + 1 - start) > limit:
            yield slice(start, end)
            start, longest = end, length
    if lengths:
        yield slice(start, len(lengths))


@dataclass(frozen=True)
class Batch:
    """Packed trajectories with the labels of their groups, on one device.

    `valid_GK` marks the real candidates. `target_G` is the index of the teacher's best candidate, `target_token_G` its
    id; `teacher_S` is what the teacher would write at each decoding state.
    """

    packed: TreeBatch
    candidates_GK: torch.Tensor
    valid_GK: torch.Tensor
    by_kl_G: torch.Tensor
    teacher_logprobs_GK: torch.Tensor
    target_G: torch.Tensor
    target_token_G: torch.Tensor
    teacher_S: torch.Tensor


def collate(items: Sequence[Trajectory], device: torch.device, leaves: bool = True) -> Batch:
    """Pack trajectories; without `leaves` the trajectories alone, with the same groups and labels."""
    trees = [item.tree for item in items]
    if not leaves:
        trees = [replace(tree, candidates_GK=np.zeros((len(tree.prefixes_G), 0), dtype=np.int64)) for tree in trees]
    width = max(item.tree.candidates_GK.shape[1] for item in items)

    def joined(parts: list[np.ndarray], filler: float) -> torch.Tensor:
        filled = [
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=part.dtype.type(filler))
            for part in parts
        ]
        return torch.from_numpy(np.concatenate(filled)).to(device)

    candidates_GK = joined([item.tree.candidates_GK for item in items], -1)
    teacher_GK = joined([item.teacher_logprobs_GK for item in items], NO_CANDIDATE)
    target_G, _ = losses.teacher_choice(teacher_GK, candidates_GK >= 0)
    return Batch(
        packed=pack(trees).to(device),
        candidates_GK=candidates_GK,
        valid_GK=candidates_GK >= 0,
        by_kl_G=torch.from_numpy(np.concatenate([item.by_kl_G for item in items])).to(device),
        teacher_logprobs_GK=teacher_GK,
        target_G=target_G,
        target_token_G=candidates_GK.gather(1, target_G[:, None])[:, 0],
        teacher_S=torch.from_numpy(np.concatenate([item.teacher_T for item in items])).to(device),
    )
