"""The value of any rank among the numbers of many files, exactly, without having them in one place.

A float32's bits, put in the order of its values, are a key of 32 bits. One pass over the files counts the upper halves
of all keys; the counts, added up, say in which bin a rank lies. A second pass counts the lower halves in those bins
alone, and that names the value. A pass can run wherever a file is; what comes back of it has a fixed size.

Axes: _S steps, _B bin (2^16 of them).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BINS = 1 << 16
#: Bin -> counts of the lower halves of the keys in it.
Fine = dict[int, np.ndarray]


def keys(values_S: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of the values."""
    bits = np.ascontiguousarray(values_S, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def coarse(values_S: np.ndarray) -> np.ndarray:
    """How many values have each upper half, [B]."""
    return np.bincount(keys(values_S) >> 16, minlength=BINS)


def fine(values_S: np.ndarray, bins: Iterable[int]) -> Fine:
    """How many values in each of the bins have each lower half."""
    key_S = keys(values_S)
    upper_S = key_S >> 16
    return {number: np.bincount(key_S[upper_S == number] & 0xFFFF, minlength=BINS) for number in bins}


def add(whole: Fine, part: Fine) -> None:
    """Count the part's too."""
    for number, fine_B in part.items():
        whole[number] = whole[number] + fine_B if number in whole else fine_B


def bin_of(coarse_B: np.ndarray, rank: int) -> int:
    """The bin of the value of a rank, which counts from 0 for the smallest."""
    return int(np.searchsorted(coarse_B.cumsum(), rank, side="right"))


def value_of(coarse_B: np.ndarray, counted: Fine, rank: int) -> float:
    """The value of a rank, from the counts of its bin and of all bins."""
    number = bin_of(coarse_B, rank)
    within = rank - int(coarse_B[:number].sum())
    key = np.uint32(number << 16 | int(np.searchsorted(counted[number].cumsum(), within, side="right")))
    bits = key ^ np.uint32(1 << 31) if key >> 31 else ~key
    return float(np.array(bits, np.uint32).view(np.float32))


def threshold_rank(total: int, share: float) -> int:
    """The rank of the threshold above which (with it) a share of `total` values lies, as `calibration.calibrate` has
    it."""
    return total - max(round(share * total), 1)


def quantile_ranks(total: int, share: float) -> tuple[int, int, float]:
    """The two ranks that a quantile lies between, and how far it is from the first to the second."""
    place = share * (total - 1)
    low = int(place)
    return low, min(low + 1, total - 1), place - low
