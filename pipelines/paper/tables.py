"""A table of the paper with ours beside it: what was measured here, the paper's value, and what is left open and why.

The paper's own rows (`published`) say what a table measures. A task that it does not have stands in for its benchmarks
where none of these was run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipelines.paper.evidence import Evidence, Value
from pipelines.paper.published import MATHS_AVERAGE, Published, published
from pipelines.results.averages import MATHS
from pipelines.results.summary import markdown_table
from pipelines.tasks import TASKS
from pipelines.tasks import task as task_named


@dataclass(frozen=True)
class Cell:
    """One figure: ours, or why it is left open (""), and the paper's by SLM."""

    benchmark: str
    task: str
    method: str
    policy: str
    metric: str
    ours: Value | None
    left_open: str
    paper: dict[str, float]

    def as_row(self, slms: Iterable[str]) -> dict[str, Any]:
        """The cell as a row of the table's CSV file."""
        ours = self.ours
        return {
            "benchmark": self.benchmark,
            "task": self.task,
            "method": self.method,
            "policy": self.policy,
            "metric": self.metric,
            "ours": None if ours is None else round(ours.value, 4),
            "low": None if ours is None or ours.low is None else round(ours.low, 4),
            "high": None if ours is None or ours.high is None else round(ours.high, 4),
            "items": None if ours is None else ours.items,
            **{f"paper {slm}": self.paper.get(slm) for slm in slms},
            "left open": self.left_open,
        }


@dataclass(frozen=True)
class Table:
    """The cells of a table. `down` is what its lines are: "method" or "metric"."""

    cells: tuple[Cell, ...]
    slms: tuple[str, ...]
    down: str = "method"

    def rows(self) -> list[dict[str, Any]]:
        return [cell.as_row(self.slms) for cell in self.cells]

    def markdown(self) -> str:
        """Lines and columns as the paper has them: ours, and the paper's in brackets in the order of `slms`."""
        across = "metric" if self.down == "method" else "method"
        several = len({getattr(cell, across) for cell in self.cells}) > 1
        columns: dict[str, None] = {}
        lines: dict[str, dict[str, str]] = {}
        for cell in self.cells:
            column = f"{cell.benchmark}, {getattr(cell, across)}" if several else cell.benchmark
            columns[column] = None
            lines.setdefault(getattr(cell, self.down), {})[column] = _shown(cell, self.slms)
        header = [self.down, *(column.replace("|", "\\|") for column in columns)]
        table = markdown_table(header, [[name, *(line.get(c, "") for c in columns)] for name, line in lines.items()])
        return "\n\n".join(filter(None, [table, self._legend(), self._left_open()]))

    def _legend(self) -> str:
        if not any(cell.paper for cell in self.cells):
            return ""
        return f"In brackets the paper's, of {' / '.join(self.slms)}." if self.slms else ""

    def _left_open(self) -> str:
        """A line for each reason, with what it leaves open."""
        reasons: dict[str, dict[str, None]] = {}
        for cell in self.cells:
            if cell.left_open:
                what = cell.benchmark if cell.left_open == NOT_RUN else getattr(cell, self.down)
                reasons.setdefault(cell.left_open, {})[what] = None
        everything = {getattr(cell, self.down) for cell in self.cells if cell.policy}
        return "\n".join(
            f"- left open: {'all' if set(what) == everything else '; '.join(what)}: {reason}"
            for reason, what in reasons.items()
        )


NOT_RUN = "not among the tasks of this run (--tasks)"


def table(
    name: str,
    evidence: Evidence,
    reads: tuple[str, ...],
    down: str = "method",
    more: bool = False,
    every_task: bool = False,
) -> Table:
    """The table of that name from the runs `reads`. A task that the paper does not have takes the place of its
    benchmarks where none of these was run, `every_task`: all that were run do; `more`: policies that were run beside
    the paper's are lines too."""
    theirs = published(name)
    benchmarks = {row.task: row.benchmark for row in theirs}
    run = [task for task in evidence.tasks if task in benchmarks]
    if not run:
        there = [part for part in reads if evidence.knows(part)]
        asked = list(dict.fromkeys(task for part in there for task in evidence.tasks_of(part)))
        asked = asked if there else list(evidence.tasks)  # what a matrix leaves out has a reason for each task
        run = asked if every_task else asked[:1]
    if MATHS_AVERAGE in benchmarks and set(MATHS) <= set(run):
        run.append(MATHS_AVERAGE)
    columns = [*(task for task in run if task not in benchmarks), *benchmarks]
    lines = dict.fromkeys((row.method, row.policy, row.metric) for row in theirs)
    if more:
        known = {policy for _, policy, _ in lines}
        beside = [
            one
            for part in reads
            if part in evidence.runs.given.matrix.benchmarks
            for one in evidence.runs.given.matrix.benchmarks[part].policies
            if one not in known
        ]
        lines |= dict.fromkeys((policy, policy, "accuracy") for policy in beside)
    cells = []
    for method, policy, metric in lines:
        for task in columns:
            paper = _paper(theirs, task, method, metric)
            printed = any((row.task, row.method, row.metric) == (task, method, metric) for row in theirs)
            if task not in run or not policy:
                if printed:
                    cells.append(_cell(benchmarks, task, method, policy, metric, NOT_RUN if policy else "", paper))
                continue
            if not _measures(metric, task):
                continue
            ours = evidence.measure(metric, task, policy, reads)
            cells.append(_cell(benchmarks, task, method, policy, metric, ours, paper))
    return Table(tuple(cells), tuple(dict.fromkeys(row.slm for row in theirs if row.value is not None)), down)


def _measures(metric: str, name: str) -> bool:
    """Whether a metric says anything of a task: ratings are of those that a judge rates, accuracies of the others."""
    judged = name in TASKS and task_named(name).judged
    return not judged if metric == "accuracy" else judged if metric == "rating" else True


def _cell(
    benchmarks: dict[str, str],
    task: str,
    method: str,
    policy: str,
    metric: str,
    ours: Value | str,
    paper: dict[str, float],
) -> Cell:
    found = ours if isinstance(ours, Value) else None
    reason = ours if isinstance(ours, str) else ""
    return Cell(benchmarks.get(task, task), task, method, policy, metric, found, reason, paper)


def _paper(theirs: tuple[Published, ...], task: str, method: str, metric: str) -> dict[str, float]:
    return {
        row.slm: row.value
        for row in theirs
        if (row.task, row.method, row.metric) == (task, method, metric) and row.value is not None
    }


def _shown(cell: Cell, slms: tuple[str, ...]) -> str:
    ours = "–" if cell.ours is None else f"{cell.ours.value:.{2 if abs(cell.ours.value) < 3 else 1}f}"
    if not cell.paper:
        return ours
    return f"{ours} ({' / '.join(f'{cell.paper[slm]:g}' if slm in cell.paper else '–' for slm in slms)})"
