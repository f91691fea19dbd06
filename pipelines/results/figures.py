"""The figures of a job and of an analysis, drawn from plain numbers. Accuracies and rates come in as
fractions.

Colours are those of Okabe and Ito, told apart without colour vision too. Nothing here computes a statistic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: Of what is level, and of series beyond the first for which there are colours.
DASHES = ("--", ":")


@dataclass(frozen=True)
class Point:
    """An accuracy with its interval, at a place on the x axis where the figure has one."""

    label: str
    accuracy: float
    low: float
    high: float
    x: float = 0.0


def accuracy(points: Sequence[Point], title: str) -> Figure:
    """Accuracies with their 95% intervals, one line a policy, the first on top."""
    figure, axes = _canvas(title, height=1.2 + 0.36 * len(points))
    for place, point in enumerate(points):
        axes.errorbar(
            100 * point.accuracy, place, xerr=_errors(point), fmt="o", color=COLOURS[0], capsize=3, markersize=5
        )
        axes.annotate(f"{100 * point.accuracy:.1f}", (100 * point.high, place), (5, -3.5), textcoords="offset points")
    axes.set_yticks(range(len(points)), [point.label for point in points])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("accuracy, % (95% interval)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def accuracy_against_cost(points: Sequence[Point], cost: str, title: str) -> Figure:
    """One marker a policy at (cost, accuracy); up and to the left is better."""
    figure, axes = _canvas(title)
    for place, point in enumerate(points):
        axes.errorbar(
            point.x,
            100 * point.accuracy,
            yerr=_errors(point),
            fmt=MARKERS[place % len(MARKERS)],
            color=COLOURS[place % len(COLOURS)],
            capsize=2,
            label=point.label,
        )
    _legend(axes, outside=True)
    axes.set_xlabel(cost)
    most = max(point.x for point in points) or 1.0
    axes.set_xlim(-0.04 * most, 1.06 * most)
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    return figure


def accuracy_over(
    series: Mapping[str, Sequence[Point]],
    x: str,
    title: str,
    percent: bool = False,
    doubling_x: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracy with intervals along an axis (the budget, K, or the size of a collection), one line a policy; `levels`
    are accuracies wherever on the axis."""
    figure, axes = _canvas(title)
    for place, (label, accuracy) in enumerate((levels or {}).items()):
        axes.axhline(100 * accuracy, color="black", linewidth=0.9, linestyle=DASHES[place % 2], label=label)
    for place, (label, points) in enumerate(series.items()):
        ordered = sorted(points, key=lambda point: point.x)
        axes.errorbar(
            [(100 if percent else 1) * point.x for point in ordered],
            [100 * point.accuracy for point in ordered],
            yerr=np.concatenate([_errors(point) for point in ordered], axis=1),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            linestyle="-" if place < len(COLOURS) else DASHES[0],
            capsize=2,
            label=label,
        )
    if doubling_x:
        _doubling(axes, {point.x for points in series.values() for point in points})
    _legend(axes, outside=len(series) + len(levels or {}) > 6)
    axes.set_xlabel(x)
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    return figure


def flips(pairs: Sequence[tuple[str, int, int]], title: str) -> Figure:
    """For each (comparison, gained, lost): the items only the first policy got right, and those only the
    second did."""
    figure, axes = _canvas(title, height=1.4 + 0.36 * len(pairs))
    places = range(len(pairs))
    gained, lost = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    axes.barh(places, gained, color=COLOURS[2], label="gained")
    axes.barh(places, [-count for count in lost], color=COLOURS[1], hatch="//", edgecolor="white", label="lost")
    for place, (plus, minus) in enumerate(zip(gained, lost, strict=True)):
        axes.annotate(str(plus), (plus, place), (4, -3.5), textcoords="offset points")
        axes.annotate(str(minus), (-minus, place), (-4, -3.5), textcoords="offset points", ha="right")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, [pair[0] for pair in pairs])
    axes.invert_yaxis()
    most = max([*gained, *lost, 1])
    axes.set_xlim(-1.15 * max([*lost, 0.15 * most]), 1.15 * max([*gained, 0.15 * most]))
    axes.set_xlabel("answers whose verdict differs")
    _legend(axes, outside=True)
    return figure


def curve(
    series: Mapping[str, Mapping[float, float]],
    x: str,
    y: str,
    title: str,
    percent_x: bool = False,
    doubling_x: bool = False,
) -> Figure:
    """Rates along an axis, one line a label: the Hit@K curve, and Hit@K over tau."""
    figure, axes = _canvas(title)
    for place, (label, values) in enumerate(series.items()):
        axes.plot(
            [(100 if percent_x else 1) * key for key in values],
            [100 * value for value in values.values()],
            color=COLOURS[place % len(COLOURS)],
            marker=MARKERS[place % len(MARKERS)],
            label=label,
        )
    if doubling_x:
        _doubling(axes, {key for values in series.values() for key in values})
    axes.set_ylim(0, 102)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


TEACHERS_RANK = "rank of the teacher's token in the SLM's order"


def rank_cdf(series: Mapping[str, np.ndarray], title: str, of: str = TEACHERS_RANK) -> Figure:
    """Steps: the share of tokens within rank r of the SLM; `of` says of which (Figures A3, A4)."""
    figure, axes = _canvas(title)
    for place, (label, shares) in enumerate(series.items()):
        ranks = np.arange(1, len(shares) + 1)
        axes.step(ranks, 100 * shares, where="post", color=COLOURS[place % len(COLOURS)], label=label)
    axes.set_xscale("log", base=2)
    longest = max((len(shares) for shares in series.values()), default=1)
    ticks = [2**power for power in range(longest.bit_length()) if 2**power <= longest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, 102)
    axes.set_xlabel(of)
    axes.set_ylabel("steps at or below that rank, %")
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def score_by_rank(scores_by_rank: Sequence[Sequence[float]], title: str) -> Figure:
    """Violins of the selector's score, one a rank the teacher gave the candidate, with medians (Figure
    A5)."""
    figure, axes = _canvas(title)
    shown = [(rank, list(scores)) for rank, scores in enumerate(scores_by_rank, 1) if len(scores)]
    if shown:
        bodies = axes.violinplot(
            [scores for _, scores in shown], [rank for rank, _ in shown], showmedians=True, widths=0.85
        )
        for body in bodies["bodies"]:  # type: ignore[attr-defined]
            body.set_facecolor(COLOURS[0])
        axes.set_xticks([rank for rank, _ in shown])
    axes.set_xlabel("rank by the teacher's probability")
    axes.set_ylabel("score")
    axes.grid(axis="y", alpha=0.3)
    return figure


def radial(ranks: Mapping[str, np.ndarray], title: str, k: int = 8) -> Figure:
    """One disc a label: each step is a point, as far from the centre as the teacher's token (0-based rank) is from the
    SLM's first, on a logarithmic scale, with a ring around the first `k` (Figures 3, A1, A2). Angles are the golden
    one's multiples: they mean nothing."""
    across = min(len(ranks), 3)
    down = -(-len(ranks) // max(across, 1))
    figure = Figure(figsize=(max(3.6 * across, 3.6), max(3.9 * down, 3.9)), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=9)
    for place, (label, rank_T) in enumerate(ranks.items()):
        axes = figure.add_subplot(down, across, place + 1, projection="polar")
        radius_T = np.log2(np.asarray(rank_T, float) + 1)
        angle_T = np.arange(len(radius_T)) * np.pi * (3 - np.sqrt(5))
        inside_T = np.asarray(rank_T) < k
        for chosen, colour in ((inside_T, COLOURS[0]), (~inside_T, COLOURS[1])):
            axes.scatter(angle_T[chosen], radius_T[chosen], s=6, alpha=0.45, color=colour, linewidths=0)
        ring = np.linspace(0, 2 * np.pi, 200)
        axes.plot(ring, np.full_like(ring, np.log2(k)), color="black", linewidth=0.9, linestyle="--")
        ticks = [1, k, 64]
        axes.set_yticks([np.log2(tick) for tick in ticks], [str(tick) for tick in ticks], fontsize=7)
        axes.set_xticks([])
        axes.set_ylim(-0.4, 6.3)
        first, within = (100 * float(mask.mean()) if len(mask) else np.nan for mask in (radius_T == 0, inside_T))
        axes.set_title(f"{label}\nHit@1 {first:.1f}%, Hit@{k} {within:.1f}%", fontsize=9)
    return figure


def cumulated_error(series: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """For each label the hit errors (solid) and with them the selection errors (dashed, their sum) up to each step
    (Eq. 12)."""
    figure, axes = _canvas(title)
    for place, (label, (hit_T, selection_T)) in enumerate(series.items()):
        colour, steps = COLOURS[place % len(COLOURS)], np.arange(1, len(hit_T) + 1)
        axes.plot(steps, hit_T, color=colour, linewidth=1.2)
        axes.plot(steps, hit_T + selection_T, color=colour, linewidth=1.2, linestyle="--", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("errors an answer: hit (solid), and with selection (dashed)")
    axes.grid(alpha=0.3)
    _legend(axes, outside=True)
    return figure


def rescue(slm: Sequence[float], teacher: Sequence[float], rescued: Sequence[bool], title: str) -> Figure:
    """Probability of the chosen token, SLM's against teacher's (Figure 4b): top left are the rescues that
    matter."""
    figure, axes = _canvas(title, width=5.2, height=5.0)
    mask = np.asarray(rescued, bool)
    x, y = np.asarray(slm, float), np.asarray(teacher, float)
    for chosen, colour, marker, label in (
        (~mask, COLOURS[6], "o", "SLM's own top-1"),
        (mask, COLOURS[1], "^", "rescue"),
    ):
        axes.scatter(x[chosen], y[chosen], s=14, alpha=0.5, color=colour, marker=marker, label=label, linewidths=0)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("SLM's probability of the chosen token")
    axes.set_ylabel("teacher's probability of the chosen token")
    _legend(axes)
    return figure


def error_split(rows: Sequence[tuple[str, float, float]], title: str) -> Figure:
    """For each (label, hit error, selection error): the two parts of Eq. 11, stacked."""
    figure, axes = _canvas(title, width=8.5)
    places = range(len(rows))
    hit, selection = [100 * row[1] for row in rows], [100 * row[2] for row in rows]
    axes.bar(places, hit, color=COLOURS[0], label="not among the candidates (hit)")
    axes.bar(
        places, selection, bottom=hit, color=COLOURS[4], hatch="//", edgecolor="white", label="not chosen (selection)"
    )
    axes.set_xticks(places, [row[0] for row in rows])
    axes.set_ylabel("triggered steps, %")
    axes.grid(axis="y", alpha=0.3)
    _legend(axes, outside=True)
    return figure


def first_wrong(counts: Mapping[str, Sequence[int]], title: str) -> Figure:
    """For each policy its wrong answers, stacked: they first go wrong at a triggered step, at another, nowhere."""
    figure, axes = _canvas(title, height=1.6 + 0.4 * len(counts))
    left = np.zeros(len(counts))
    kinds = ("at a triggered step", "elsewhere", "nowhere: the teacher could have written each token")
    for place, (label, hatch) in enumerate(zip(kinds, ("//", "", ".."), strict=True)):
        number = np.array([of_policy[place] for of_policy in counts.values()])
        axes.barh(
            range(len(counts)), number, left=left, color=COLOURS[place], hatch=hatch, edgecolor="white", label=label
        )
        left += number
    axes.set_yticks(range(len(counts)), list(counts))
    axes.invert_yaxis()
    axes.set_xlabel("wrong answers")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3)
    return figure


def groups(points: Sequence[Point], title: str) -> Figure:
    """Accuracy of groups of answers with intervals: those that agree with the teacher at every step, and the
    others."""
    figure, axes = _canvas(title, width=max(5.2, 0.95 * len(points)))
    for place, point in enumerate(points):
        axes.bar(place, 100 * point.accuracy, color=COLOURS[place % len(COLOURS)], width=0.6)
        axes.errorbar(place, 100 * point.accuracy, yerr=_errors(point), color="black", capsize=3)
    axes.set_xticks(range(len(points)), [point.label for point in points], fontsize=8)
    axes.set_ylim(0, 102)
    axes.set_ylabel("accuracy, % (95% interval)")
    axes.grid(axis="y", alpha=0.3)
    return figure


def _canvas(title: str, width: float = 7.0, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, max(height, 2.2)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _doubling(axes: Axes, places: Set[float]) -> None:
    """A logarithmic x axis with a tick at each place."""
    axes.set_xscale("log", base=2)
    ticks = sorted(places)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _legend(axes: Axes, outside: bool = False) -> None:
    if axes.get_legend_handles_labels()[1]:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {}
        axes.legend(frameon=False, fontsize=8, **place)


def _errors(point: Point) -> np.ndarray:
    return 100 * np.array([[max(0.0, point.accuracy - point.low)], [max(0.0, point.high - point.accuracy)]])
