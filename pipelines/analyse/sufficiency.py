"""Local sufficiency in figures: hit rates, rank curves, and how well a scorer's order agrees with the
teacher's.

Pure functions over arrays, without I/O. Ranks are 0-based positions of the teacher's preferred token in the
SLM's order. Axes: _T step, _K candidate. They know nothing of models or of how triggered steps were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau, spearmanr


def top_steps(kl_T: np.ndarray, tau: float) -> np.ndarray:
    """Mask of the steps whose divergence reaches the (1 - tau) percentile of all of them (section 4.1)."""
    kl_T = np.asarray(kl_T, float)
    if not len(kl_T):
        return np.zeros(0, bool)
    return kl_T >= np.quantile(kl_T, 1 - tau)


def hit_at(ranks_T: np.ndarray, ks: Iterable[int]) -> dict[int, float]:
    """Hit@k: the share of steps where the teacher's preferred token is among the SLM's first k (section
    5.1)."""
    ranks_T = np.asarray(ranks_T)
    return {k: float((ranks_T < k).mean()) if len(ranks_T) else float("nan") for k in ks}


def rank_cdf(ranks_T: np.ndarray, length: int) -> np.ndarray:
    """Share of steps with a rank of at most r, for r = 1..length counted from 1 (Figures A3, A4):
    [length]."""
    hits = hit_at(ranks_T, range(1, length + 1))
    return np.asarray([hits[k] for k in range(1, length + 1)])


@dataclass(frozen=True)
class Alignment:
    """How a scorer's order agrees with a reference over groups of candidates (Tables 2 and A9): means over
    steps. The correlations leave out the `undefined` steps where one side has no order (all scores alike, one
    candidate)."""

    agree_at_1: float
    kendall: float
    spearman: float
    steps: int
    undefined: int


def alignment(
    scores: Sequence[Sequence[float] | np.ndarray], reference: Sequence[Sequence[float] | np.ndarray]
) -> Alignment:
    """Agree@1, Kendall's tau-b and Spearman's rho of two scorings of the same candidates, step by step."""
    agree, kendall, spearman = [], [], []
    for scores_K, reference_K in zip(scores, reference, strict=True):
        a_K, b_K = np.asarray(scores_K, float), np.asarray(reference_K, float)
        agree.append(bool(a_K.argmax() == b_K.argmax()))
        if np.ptp(a_K) > 0 and np.ptp(b_K) > 0:
            kendall.append(float(kendalltau(a_K, b_K).statistic))
            spearman.append(float(spearmanr(a_K, b_K).statistic))
    means = [float(np.mean(values)) if values else float("nan") for values in (agree, kendall, spearman)]
    return Alignment(means[0], means[1], means[2], steps=len(agree), undefined=len(agree) - len(kendall))


def entropy(probabilities_K: Sequence[float] | np.ndarray) -> float:
    """Entropy in nats of weights normalised to one; 0 where they are all zero."""
    weights_K = np.asarray(probabilities_K, float)
    total = weights_K.sum()
    if total <= 0:
        return 0.0
    share_K = weights_K[weights_K > 0] / total
    return float(-(share_K * np.log(share_K)).sum())


@dataclass(frozen=True)
class ErrorSplit:
    """Eq. 11 as shares of the triggered steps: `hit` where the reference token was not among the candidates,
    `selection` where it was and another was chosen. Their sum is the 0-1 decoding error of Eq. 10."""

    hit: float
    selection: float
    steps: int


def error_split(candidates: Sequence[Sequence[int]], chosen: Sequence[int], reference: Sequence[int]) -> ErrorSplit:
    """Split the error of decisions, one entry a triggered step; `reference` holds the teacher's own token."""
    hit = selection = 0
    for candidates_K, choice, target in zip(candidates, chosen, reference, strict=True):
        if target not in candidates_K:
            hit += choice != target
        elif choice != target:
            selection += 1
    steps = len(chosen)
    return ErrorSplit(hit / steps if steps else float("nan"), selection / steps if steps else float("nan"), steps)
