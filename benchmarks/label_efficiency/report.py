"""The curves and their tables, from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.label_efficiency.measuring import Case, Measured
from benchmarks.label_efficiency.plan import KD, REFERENCES, SYSTEMS
from pipelines.results import figures as draw
from pipelines.results.statistics import accuracy, paired
from pipelines.results.summary import markdown_table
from s2t_models.storage import whole, write_text

TABLE = "table.md"
#: What the others are compared with, at equal teacher cost.
CONTROLS = (KD, "distil")
RESCUE = "gain of the rescue"
HEADER = (
    *("prompts", "system", "texts", "steps", "teacher read", "teacher wrote", "accuracy %", "of each training"),
    *(f"against {control}" for control in CONTROLS),
    *(RESCUE, "length", "KL of the text head", "kept %", f"kept against {KD}", "triggered %"),
    *("wrong at triggered", "wrong elsewhere"),
)
LEGEND = """\
Every system of a number of prompts is trained at the teacher cost of that many labelled prompts. `selector`, `kd` and
what is made of both share their labels; `kd-at-triggers` is `selector` with `kd` choosing at its triggered steps. Those
that are `-rescued` have as many texts that S2T wrote as cost no more, what was read of drafts that were cut included.
`distil` has as many of the teacher's own texts as cost no more, and `tsd-kd` lets the teacher read about as many texts
of its own. `texts`, `teacher read` and `teacher wrote` (its tokens, as metered) are means over the seeds, and so is
what follows; `of each training` has the accuracies seed by seed. `against kd` and `against distil` are differences of
accuracies with their 95% intervals, by the paired bootstrap over items, and so is `gain of the rescue`, from the same
system on the SLM's own texts. `length` is the mean of an answer, in tokens. `KL of the text head` is KL(base ||
trained) in nats a token on what the base writes; what a selector changes at triggered steps is not in it. `kept` is the
accuracy on the items that the base solves. `triggered` is the share of tokens that were decided at triggered steps.
`wrong at triggered` and `wrong elsewhere` count the wrong answers whose first token that the teacher gives less than 5%
is at a triggered step, and at another one."""


@dataclass(frozen=True)
class Curve:
    """What was measured of one system on a task, at one number of prompts, with one choice of settings and at one
    budget (None: it decodes without): a run a seed, by seed."""

    system: str
    prompts: int
    settings: str
    budget: float | None
    runs: Mapping[int, Measured]

    @property
    def label(self) -> str:
        budget = [] if self.budget is None else [f"@{100 * self.budget:g}%"]
        return " ".join([self.system, *budget, *self.settings.split()])

    @property
    def rescued(self) -> str | None:
        """The system that this one is, but for texts that S2T wrote; None where the SLM or the teacher wrote them."""
        system = SYSTEMS.get(self.system)
        return system.objective if system and system.rescued else None

    @property
    def items(self) -> list[int]:
        return [item for run in self.runs.values() for item in range(len(run.correct))]

    @property
    def correct(self) -> list[bool]:
        return [right for run in self.runs.values() for right in run.correct]

    def at(self, seeds: Sequence[int]) -> Curve:
        return replace(self, runs={seed: self.runs[seed] for seed in seeds})

    def kept(self, base: Measured) -> Curve:
        """On the items alone that the base solves."""
        solved = np.array(base.correct)
        runs = {seed: replace(run, correct=np.array(run.correct)[solved].tolist()) for seed, run in self.runs.items()}
        return replace(self, runs=runs)


def write(found: Mapping[Case, Measured], folder: Path) -> str:
    """Write the tables and the curves of all tasks to `folder`; returns the tables as Markdown."""
    parts = []
    for task in dict.fromkeys(case.task for case in found):
        references, curves = _curves(one for case, one in found.items() if case.task == task)
        parts.append(f"### {task}\n\n{_table(references, curves)}")
        budgets: set[float | None] = {curve.budget for curve in curves if curve.budget}
        for budget in budgets or {None}:
            shown = [curve for curve in curves if curve.budget in (None, budget)]
            if any(curve.settings for curve in shown):  # a table is read more easily than so many lines
                continue
            name = f"{task}-at-{100 * budget:g}" if budget else task
            _draw(shown, references, folder / f"accuracy-{name}.png", f"{task}: accuracy")
            if base := references.get("base"):
                kept = [curve.kept(base) for curve in shown]
                _draw(kept, {}, folder / f"kept-{name}.png", f"{task}: accuracy where the base is right")
    text = "\n\n".join([*parts, LEGEND]) + "\n"
    write_text(folder / TABLE, text)
    return text


def _curves(found: Iterator[Measured]) -> tuple[dict[str, Measured], list[Curve]]:
    """The references by name, and what was trained, by prompts."""
    references: dict[str, Measured] = {}
    runs: dict[tuple[str, int, str, float | None], dict[int, Measured]] = {}
    for one in found:
        point, budget = one.case.point, one.case.policy.partition("@")[2]
        if point.system in REFERENCES:
            references[point.system] = one
        else:
            of = (point.system, point.prompts, point.settings, float(budget) if budget else None)
            runs.setdefault(of, {})[point.seed] = one
    curves = [Curve(*of, by_seed) for of, by_seed in runs.items()]
    # Where settings are varied, the best come first.
    return references, sorted(
        curves, key=lambda curve: (curve.prompts, -float(np.mean(curve.correct)) if curve.settings else 0.0)
    )


def _table(references: Mapping[str, Measured], curves: Sequence[Curve]) -> str:
    base = references.get("base")
    controls = {(curve.system, curve.prompts, curve.settings): curve for curve in curves if curve.system in CONTROLS}
    rows = [
        {"system": name, "accuracy %": _percent(_reference(one)), "length": _length([one])}
        for name, one in references.items()
    ]
    by_kind = {(curve.system, curve.prompts, curve.settings, curve.budget): curve for curve in curves}
    for curve in curves:
        others = {
            name: controls.get((name, curve.prompts, curve.settings)) for name in CONTROLS if name != curve.system
        }
        row = _row(curve, others, base if base and any(base.correct) else None)
        if curve.rescued and (plain := by_kind.get((curve.rescued, curve.prompts, curve.settings, curve.budget))):
            row[RESCUE] = _against(curve, plain)
        rows.append(row)
    return markdown_table(HEADER, [tuple(row.get(column, "") for column in HEADER) for row in rows])


def _row(curve: Curve, controls: Mapping[str, Curve | None], base: Measured | None) -> dict[str, str]:
    """What the table says of a curve, by column."""
    runs = list(curve.runs.values())
    outcomes = [run.outcome for run in runs if run.outcome]
    row = {
        "prompts": str(curve.prompts),
        "system": curve.label,
        "texts": f"{np.mean([one.texts for one in outcomes]):.0f}",
        "steps": f"{np.mean([one.steps for one in outcomes]):.0f}",
        "teacher read": f"{np.mean([one.teacher_read for one in outcomes]):,.0f}",
        "teacher wrote": f"{np.mean([one.teacher_written for one in outcomes]):,.0f}",
        "accuracy %": _percent(curve),
        "of each training": ", ".join(_percent(curve.at([seed])) for seed in sorted(curve.runs))
        if len(runs) > 1
        else "",
        "length": _length(runs),
        "KL of the text head": f"{np.mean([run.drift or 0.0 for run in runs]):.4f}",
    }
    row |= {f"against {name}": _against(curve, other) for name, other in controls.items() if other}
    if base:
        kept, kd = curve.kept(base), controls.get(KD)
        row |= {"kept %": _percent(kept)} | ({f"kept against {KD}": _against(kept, kd.kept(base))} if kd else {})
    if curve.budget:
        row["triggered %"] = f"{100 * np.mean([run.triggered for run in runs]):.1f}"
    places = [run.first_wrong for run in runs if run.first_wrong]
    if places:
        row["wrong at triggered"] = f"{np.mean([one['at_triggered'] for one in places]):.1f}"
        row["wrong elsewhere"] = f"{np.mean([one['elsewhere'] for one in places]):.1f}"
    return row


def _reference(one: Measured) -> Curve:
    return Curve(one.case.point.system, 0, "", None, {0: one})


def _length(runs: Sequence[Measured]) -> str:
    """Empty for what was measured before lengths were kept."""
    lengths = [run.length for run in runs if run.length is not None]
    return f"{np.mean(lengths):.1f}" if lengths else ""


def _percent(curve: Curve) -> str:
    return f"{100 * np.mean(curve.correct):.1f}"


def _against(curve: Curve, control: Curve) -> str:
    """The difference on the seeds that both have."""
    seeds = [seed for seed in curve.runs if seed in control.runs]
    if not seeds:
        return ""
    one, other = curve.at(seeds), control.at(seeds)
    difference = paired(one.items, one.correct, other.correct)
    return f"{100 * difference.difference:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _draw(curves: Sequence[Curve], references: Mapping[str, Measured], path: Path, title: str) -> None:
    """Accuracy over prompts; a reference is a level line."""
    series: dict[str, list[draw.Point]] = {}
    for curve in curves:
        if curve.correct:
            series.setdefault(curve.label, []).append(_point(curve, curve.prompts))
    if series:
        levels = {name: float(np.mean(one.correct)) for name, one in references.items()}
        x = "labelled prompts, or as much of the teacher"
        figure = draw.accuracy_over(series, x, title, doubling_x=True, levels=levels)
        with whole(path) as part:
            figure.savefig(part, format="png")


def _point(curve: Curve, size: float) -> draw.Point:
    found = accuracy(curve.items, curve.correct)
    return draw.Point(curve.label, found.accuracy, found.low, found.high, size)
