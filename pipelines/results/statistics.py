"""Statistics of graded answers: intervals, seeds and paired comparisons, as pure functions without I/O.

The item is the unit that was sampled: where an item was asked with several seeds its answers are not
independent, so every interval and test here clusters by item. What these functions do not know: tasks,
policies, verdicts other than correct or not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom
from statsmodels.stats.proportion import proportion_confint

RESAMPLES = 10_000


def wilson(correct: float, total: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of `correct` out of `total`, as fractions; (0, 1) where nothing was counted.

    Raises ValueError where `correct` does not lie in 0..total."""
    if not 0 <= correct <= total:
        raise ValueError(f"{correct} correct of {total}: expected 0 <= correct <= total")
    if total == 0:
        return 0.0, 1.0
    low, high = proportion_confint(correct, total, alpha=1 - confidence, method="wilson")
    # The exact bounds are 0 and 1 at the ends; rounding leaves them a hair away.
    return (0.0 if correct == 0 else float(low)), (1.0 if correct == total else float(high))


@dataclass(frozen=True)
class Accuracy:
    """Accuracy with its interval, all fractions. `deviation` is the sample deviation of the seeds' accuracies
    (None with one seed); `rows` counts answers, `items` distinct questions."""

    accuracy: float
    low: float
    high: float
    items: int
    rows: int
    deviation: float | None


def accuracy(
    items: Sequence[Hashable],
    correct: Sequence[bool],
    seeds: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Accuracy:
    """Accuracy of one policy. With one answer an item the interval is Wilson's; with several it is Wilson's
    at the effective number of answers, total / design effect, where the design effect is the variance of the
    mean clustered by item over that of independent answers. Raises ValueError without rows."""
    if not len(correct):
        raise ValueError("no answers to take the accuracy of")
    right = np.asarray(correct, float)
    groups = _groups(items)
    number = int(groups.max()) + 1
    mean, total = float(right.mean()), len(right)
    effective = float(total)
    if number < total:
        spread = float((np.bincount(groups, right - mean, number) ** 2).sum()) / total**2
        plain = mean * (1 - mean) / total
        # Where all answers agree there is no spread to measure: count items, the cautious end.
        effective = float(np.clip(total * plain / spread, 1, total)) if spread > 0 else float(number)
    low, high = wilson(mean * effective, effective, confidence)
    return Accuracy(mean, low, high, number, total, None if seeds is None else over_seeds(seeds, right)[1])


def over_seeds(seeds: Sequence[Hashable], values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """(mean, sample deviation) of the seeds' means; the deviation is None with a single seed."""
    groups = _groups(seeds)
    means = np.bincount(groups, np.asarray(values, float)) / np.bincount(groups)
    return float(means.mean()), float(means.std(ddof=1)) if len(means) > 1 else None


@dataclass(frozen=True)
class Paired:
    """Policy a minus policy b on the same rows: `difference` of accuracies with its bootstrap interval, the
    exact two-sided `p`, and the indices of the rows that only a (`gained`) or only b (`lost`) got right."""

    difference: float
    low: float
    high: float
    p: float
    items: int
    gained: tuple[int, ...]
    lost: tuple[int, ...]


def paired(
    items: Sequence[Hashable],
    a: Sequence[bool],
    b: Sequence[bool],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired:
    """Compare two policies row by row: `items[i]`, `a[i]` and `b[i]` belong to the same question and seed.

    The interval is the percentile bootstrap over items (seeded). `p` is the exact McNemar test of
    `sign_flip_p`. Raises ValueError where the lengths differ or there are no rows."""
    if not len(items) == len(a) == len(b) or not len(items):
        raise ValueError(f"paired rows needed: {len(items)} items, {len(a)} and {len(b)} answers")
    difference = np.asarray(a, int) - np.asarray(b, int)
    groups = _groups(items)
    per_item, rows_per_item = np.bincount(groups, difference), np.bincount(groups)
    number = len(per_item)
    # Resampling items is drawing how often each kind of item appears: the same law as indices, at a fraction
    # of the work.
    kinds, kind_counts = np.unique(np.stack([per_item, rows_per_item]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(number, kind_counts / number, size=resamples)
    means = (draws @ kinds[0]) / (draws @ kinds[1])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Paired(
        float(difference.mean()),
        float(low),
        float(high),
        sign_flip_p(per_item.astype(int)),
        number,
        tuple(np.flatnonzero(difference > 0).tolist()),
        tuple(np.flatnonzero(difference < 0).tolist()),
    )


def sign_flip_p(differences: Sequence[int] | np.ndarray) -> float:
    """Exact two-sided p of "either policy is as likely to be ahead on an item", from each item's difference
    in the number of correct answers: the chance that signs thrown at random give a total as far from zero.

    With one answer an item this is the exact McNemar test; with several seeds it is McNemar's idea clustered
    by item."""
    sizes = np.abs(np.asarray(differences, int))
    law = np.ones(1)
    for size in np.unique(sizes[sizes > 0]):
        number = int((sizes == size).sum())
        # The sum of `number` signs times `size`: binomial, spread to steps of 2 * size.
        signs = np.zeros(2 * size * number + 1)
        signs[:: 2 * size] = binom.pmf(np.arange(number + 1), number, 0.5)
        law = np.asarray(np.convolve(law, signs))
    centre = (len(law) - 1) // 2
    distance = np.abs(np.arange(len(law)) - centre)
    return float(min(1.0, law[distance >= abs(int(np.sum(differences)))].sum()))


def _groups(labels: Sequence[Hashable]) -> np.ndarray:
    """Labels as numbers from 0, in order of first appearance."""
    number: dict[Hashable, int] = {}
    return np.asarray([number.setdefault(label, len(number)) for label in labels], int)
