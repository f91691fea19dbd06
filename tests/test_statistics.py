"""Statistics against closed forms, brute force and independent implementations."""

from __future__ import annotations

from itertools import product
from math import comb, log, sqrt
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy.stats import rankdata

from pipelines.analyse.sufficiency import alignment, entropy, error_split, hit_at, rank_cdf, top_steps
from pipelines.results.averages import MATHS, maths_averages, maths_table
from pipelines.results.statistics import accuracy, over_seeds, paired, sign_flip_p, wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 7), (3, 7), (7, 7), (171, 500), (1, 1)])
def test_wilson_is_the_closed_form(correct: int, total: int) -> None:
    z = 1.959963984540054
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    assert wilson(correct, total) == pytest.approx((max(0.0, centre - half), min(1.0, centre + half)), abs=1e-9)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 9)[0] == 0.0
    assert wilson(9, 9)[1] == 1.0
    with pytest.raises(ValueError, match="correct"):
        wilson(8, 7)


def test_one_answer_an_item_has_wilsons_interval() -> None:
    figures = accuracy(range(10), [True] * 4 + [False] * 6, [0] * 10)
    assert (figures.low, figures.high) == wilson(4, 10)
    assert (figures.accuracy, figures.items, figures.rows, figures.deviation) == (0.4, 10, 10, None)


def test_repeating_every_answer_with_more_seeds_adds_no_certainty() -> None:
    correct = [True] * 12 + [False] * 28
    thrice = accuracy([*range(40)] * 3, correct * 3, [0] * 40 + [1] * 40 + [2] * 40)
    assert (thrice.low, thrice.high) == pytest.approx(wilson(12, 40))
    assert thrice.deviation == 0.0
    assert accuracy([*range(5)] * 3, [True] * 15).low == pytest.approx(wilson(5, 5)[0])


def test_independent_seeds_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    figures = accuracy(np.repeat(range(400), 3).tolist(), (rng.random(1200) < 0.5).tolist())
    low, high = wilson(400 * figures.accuracy * 3, 1200)
    assert figures.high - figures.low == pytest.approx(high - low, rel=0.15)


def test_over_seeds() -> None:
    mean, deviation = over_seeds([0, 0, 1, 1, 2, 2], [1, 0, 1, 1, 0, 0])
    assert mean == pytest.approx(0.5)
    assert deviation == pytest.approx(0.5)
    assert over_seeds([0, 0], [1, 0]) == (0.5, None)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (9, 2), (5, 5), (30, 12)])
def test_p_is_the_exact_mcnemar_test_with_one_answer_an_item(gained: int, lost: int) -> None:
    discordant = gained + lost
    tail = sum(comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    differences = [1] * gained + [-1] * lost + [0] * 20
    assert sign_flip_p(differences) == pytest.approx(min(1.0, 2 * tail))


def test_p_with_several_seeds_is_every_flip_of_signs_by_item() -> None:
    differences = [3, -1, 2, 0, 1, 1, -2, 3]
    totals = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=8)]
    expected = np.mean([abs(total) >= abs(sum(differences)) for total in totals])
    assert sign_flip_p(differences) == pytest.approx(expected)


def test_paired_difference_interval_and_flips() -> None:
    a = [True, True, True, False, True, False, True, True]
    b = [True, False, False, False, True, True, False, True]
    result = paired(range(8), a, b)
    assert result.difference == pytest.approx(2 / 8)
    assert (result.gained, result.lost) == ((1, 2, 6), (5,))
    assert result.low <= result.difference <= result.high
    assert result == paired(range(8), a, b), "the bootstrap is seeded"
    mirrored = paired(range(8), b, a)
    assert (mirrored.difference, mirrored.p) == pytest.approx((-result.difference, result.p))


def test_the_bootstrap_interval_is_that_of_resampled_items() -> None:
    rng = np.random.default_rng(3)
    items = np.repeat(range(60), 2)
    a, b = rng.random(120) < 0.6, rng.random(120) < 0.45
    result = paired(items.tolist(), a.tolist(), b.tolist())
    by_item = (a.astype(int) - b.astype(int)).reshape(60, 2)
    draws = [by_item[rng.integers(0, 60, 60)].mean() for _ in range(10_000)]
    assert (result.low, result.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.01)


def test_paired_refuses_rows_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="paired rows"):
        paired([1, 2], [True], [False, True])


def test_hit_rates_and_rank_curve() -> None:
    ranks = np.array([0, 1, 1, 7, 64])
    assert hit_at(ranks, (1, 2, 8, 64)) == pytest.approx({1: 0.2, 2: 0.6, 8: 0.8, 64: 0.8})
    assert rank_cdf(ranks, 3) == pytest.approx([0.2, 0.6, 0.6])


def test_top_steps_are_the_share_with_the_largest_divergence() -> None:
    kl = np.random.default_rng(0).random(1000)
    mask = top_steps(kl, 0.05)
    assert mask.sum() == 50
    assert kl[mask].min() > kl[~mask].max()


def test_alignment_against_definitions() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.random(6) for _ in range(20)]
    reference = [rng.random(6) for _ in range(20)]
    result = alignment(scores, reference)
    kendall = [
        np.mean([np.sign((a[i] - a[j]) * (b[i] - b[j])) for i in range(6) for j in range(i)])
        for a, b in zip(scores, reference, strict=True)
    ]
    spearman = [np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in zip(scores, reference, strict=True)]
    agree = [a.argmax() == b.argmax() for a, b in zip(scores, reference, strict=True)]
    expected = (np.mean(agree), np.mean(kendall), np.mean(spearman))
    assert (result.agree_at_1, result.kendall, result.spearman) == pytest.approx(expected)


def test_alignment_leaves_out_steps_without_an_order() -> None:
    result = alignment([[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [0.7, 0.3]])
    assert (result.steps, result.undefined, result.kendall) == (2, 1, 1.0)


def test_entropy_normalises() -> None:
    assert entropy([2.0, 2.0, 0.0]) == pytest.approx(log(2))
    assert entropy([0.0, 0.0]) == 0.0


def test_error_split_is_equation_11() -> None:
    split = error_split([[1, 2], [1, 2], [1, 2], [3, 4]], [1, 1, 1, 9], [1, 2, 7, 9])
    assert (split.hit, split.selection, split.steps) == (0.25, 0.25, 4)


def test_the_maths_average_and_its_gain_are_the_papers():
    """Table 1's 1.5B rows: 36.9 greedy and 45.8 S2T-Local, a relative gain of 24.1%."""
    accuracies = {"greedy": (72.1, 54.4, 20.1, 1.1), "s2t-local": (86.6, 67.5, 27.0, 2.2), "maj@8": (81.4,)}
    summaries = [
        SimpleNamespace(task=task, policy=policy, accuracy=value / 100, low=value / 100 - 0.04, high=value / 100 + 0.04)
        for policy, values in accuracies.items()
        for task, value in zip(MATHS, values, strict=False)
    ]
    greedy, local = maths_averages(cast(Any, summaries))
    assert (greedy.policy, local.policy) == ("greedy", "s2t-local")  # maj@8 has not answered all tasks
    assert round(100 * greedy.accuracy, 1) == 36.9
    assert round(100 * local.accuracy, 1) == 45.8
    assert 100 * local.gain == pytest.approx(24.1, abs=0.05)
    assert local.high - local.accuracy == pytest.approx(0.04 / 2)  # four equal half-widths
    table = maths_table([greedy, local])
    assert "45.8 | [43.8, 47.8]" in table
    assert "+24.1" in table
    assert maths_table(maths_averages([])) == ""
