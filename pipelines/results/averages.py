"""The paper's Math Avg. (Table 1) and its gain on greedy decoding, where a job has the four tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.results.summary import Summary, markdown_table

#: The tasks of Math Avg.: 72.1, 54.4, 20.1 and 1.1 are the paper's 36.9.
MATHS = ("gsm8k", "math500", "olympiadbench", "aime25")
BASELINE = "greedy"


@dataclass(frozen=True)
class MathsAverage:
    """A policy's mean accuracy over the tasks of MATHS, each counting the same, with a 95% interval; `gain` is relative
    to greedy decoding's, None without that. All are fractions."""

    policy: str
    accuracy: float
    low: float
    high: float
    gain: float | None


def maths_averages(summaries: Sequence[Summary]) -> list[MathsAverage]:
    """One for each policy that has answered all four tasks, in their order."""
    accuracy: dict[str, dict[str, Summary]] = {}
    for summary in summaries:
        accuracy.setdefault(summary.policy, {})[summary.task] = summary
    whole = {policy: of for policy, of in accuracy.items() if set(MATHS) <= of.keys()}
    means = {policy: sum(of[task].accuracy for task in MATHS) / len(MATHS) for policy, of in whole.items()}
    base = means.get(BASELINE)
    found = []
    for policy, of in whole.items():
        # The tasks' errors are independent of each other, so their half-widths add up in squares.
        half = math.hypot(*((of[task].high - of[task].low) / 2 for task in MATHS)) / len(MATHS)
        mean = means[policy]
        gain = mean / base - 1 if base else None
        found.append(MathsAverage(policy, mean, max(mean - half, 0.0), min(mean + half, 1.0), gain))
    return found


def maths_table(averages: Sequence[MathsAverage]) -> str:
    """The averages as Markdown; empty where there are none."""
    if not averages:
        return ""
    rows = [
        (
            one.policy,
            f"{100 * one.accuracy:.1f}",
            f"[{100 * one.low:.1f}, {100 * one.high:.1f}]",
            "" if one.gain is None or one.policy == BASELINE else f"{100 * one.gain:+.1f}",
        )
        for one in averages
    ]
    columns = ("policy", "maths average %", "95% interval", "relative gain %")
    return f"\n### maths average: {', '.join(MATHS)}\n\n{markdown_table(columns, rows)}\n"
