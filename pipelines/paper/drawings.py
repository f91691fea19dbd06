"""The figures of the paper, drawn from what was run: each with the numbers it shows, as rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from matplotlib.figure import Figure

from pipelines.analyse.decisions import (
    SELECTED,
    Decision,
    decisions_of,
    rescued,
    scores_by_rank,
    selected_ranks,
    teacher_K,
)
from pipelines.analyse.errors import Place, of_answers
from pipelines.analyse.sufficiency import hit_at, rank_cdf, top_steps
from pipelines.paper.evidence import STATES, UNAUDITED, Evidence, Value
from pipelines.results import figures as draw
from s2t_models.calibration import BUDGETS
from s2t_models.policies.variants import variant

#: The budget at which states are shown, and the K that is held where tau varies (the paper's defaults).
TAU, K = 0.01, 8
KS = (2, 4, 8, 16)
SWEEP, MAIN = "budgets", "main"


@dataclass
class Drawing:
    """Figures by the end of their file name, the rows they are drawn from, and what is left open."""

    figures: dict[str, Figure] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_open: list[str] = field(default_factory=list)


def sufficiency(evidence: Evidence) -> Drawing:
    """Figure 1: accuracy over K and tau; accuracy and the hit rate over K (tau held), and over tau (K held)."""
    drawing = Drawing()
    for task in evidence.tasks_of(SWEEP):
        lines: dict[str, list[draw.Point]] = {}
        hits: dict[tuple[int, float], tuple[float, float]] = {}
        for tau in BUDGETS:
            for label, policy in [
                ("Takeover", f"takeover@{tau:g}"),
                *((f"S2T, K = {k}", f"s2t-k{k}@{tau:g}") for k in KS),
            ]:
                accuracy = evidence.measure("accuracy", task, policy, (SWEEP,))
                if isinstance(accuracy, str):
                    _open(drawing, f"{policy} on {task}: {accuracy}")
                    continue
                low, high = accuracy.low or 0.0, accuracy.high or 0.0
                point = draw.Point(label, accuracy.value / 100, low / 100, high / 100, tau)
                lines.setdefault(label, []).append(point)
                row = {"task": task, "policy": policy, "tau": tau, "accuracy": accuracy.value, "low": low, "high": high}
                hit = evidence.measure("Hit@C", task, policy, (SWEEP,))
                if isinstance(hit, Value) and policy.startswith("s2t"):
                    row |= {"hit": hit.value}
                    hits[int(label.split()[-1]), tau] = hit.value / 100, accuracy.value / 100
                drawing.rows.append(row)
        if lines:
            drawing.figures[f"a-{task}"] = draw.accuracy_over(lines, "budget tau, %", f"{task}: accuracy", percent=True)
        over_k = {k: pair for (k, tau), pair in hits.items() if tau == TAU}
        over_tau = {tau: pair for (k, tau), pair in hits.items() if k == K}
        for end, values, label, held in (
            ("b", over_k, "candidates K", f"tau = {100 * TAU:g}%"),
            ("c", over_tau, "budget tau, %", f"K = {K}"),
        ):
            if values:
                series = {
                    name: {x: pair[i] for x, pair in values.items()} for i, name in enumerate(("hit rate", "accuracy"))
                }
                options = {"percent_x": end == "c", "doubling_x": end == "b"}
                drawing.figures[f"{end}-{task}"] = draw.curve(series, label, "%", f"{task}, {held}", **options)
    return drawing


def radial(evidence: Evidence) -> Drawing:
    """Figures 3, A1 and A2: how far from the SLM's first token the teacher's lies, at the top states by KL."""
    drawing, ranks = Drawing(), _ranks(evidence)
    for task in evidence.tasks_of(STATES):
        if task not in ranks:
            drawing.left_open.append(f"{task}: the collection states {task} has not run")
            continue
        hit = hit_at(ranks[task], (1, K))
        drawing.rows.append({"task": task, "tau": TAU, "hit@1": hit[1], f"hit@{K}": hit[K], "states": len(ranks[task])})
    if ranks:
        drawing.figures[""] = draw.radial(ranks, f"Rank of the teacher's token, top {100 * TAU:g}% by KL", K)
    return drawing


def teacher_ranks(evidence: Evidence) -> Drawing:
    """Figure A3: the CDF of the teacher's rank in the SLM's order, a line a task."""
    ranks = _ranks(evidence)
    drawing = _cdfs(
        {task: (rank_T, 64) for task, rank_T in ranks.items()}, "Rank of the teacher's token", draw.TEACHERS_RANK
    )
    drawing.left_open += [
        f"{t}: the collection states {t} has not run" for t in evidence.tasks_of(STATES) if t not in ranks
    ]
    return drawing


def chosen_ranks(evidence: Evidence) -> Drawing:
    """Figure A4: the CDF of the rank of the tokens that were selected, a line a task and policy."""
    ranks: dict[str, tuple[np.ndarray, int]] = {}
    missing = []
    for task in evidence.tasks_of(MAIN):
        for policy in ("s2t", "s2t-local"):
            selected = selected_ranks(_decisions(evidence, MAIN, task, policy))
            if selected:
                ranks[f"{policy}, {task}"] = np.array(selected), max(K, max(selected) + 1)
            else:
                missing.append(f"{policy} on {task}: {_why(evidence, task, policy)}")
    drawing = _cdfs(ranks, "Rank of the selected token", SELECTED)
    drawing.left_open += missing
    return drawing


def probabilities(evidence: Evidence) -> Drawing:
    """Figure 4: (a) mean probability and score of what was selected over tau; (b) the teacher's probability of it
    against the SLM's."""
    drawing = Drawing()
    for task in evidence.tasks_of(SWEEP):
        series: dict[str, dict[float, float]] = {}
        for kind in ("s2t", "s2t-local"):
            for tau in BUDGETS:
                policy = f"{kind}-k{K}@{tau:g}"
                metrics = {"SLM": "SLM on sel.", "teacher": "LLM on sel."} | (
                    {"score": "Score on sel."} if kind == "s2t-local" else {}
                )
                for label, metric in metrics.items():
                    value = evidence.measure(metric, task, policy, (SWEEP,))
                    if isinstance(value, str):
                        _open(drawing, f"(a) {policy} on {task}: {value}")
                        continue
                    series.setdefault(f"{kind}: {label}", {})[tau] = value.value / 100
                    drawing.rows.append({"task": task, "policy": policy, "tau": tau, "of": label, "mean": value.value})
        if series:
            title = f"{task}: what is selected"
            drawing.figures[f"a-{task}"] = draw.curve(
                series, "budget tau, %", "mean on selected tokens, %", title, percent_x=True
            )
    for task in evidence.tasks_of(MAIN):
        for policy in ("s2t", "s2t-local"):
            seen = [
                (decision, teacher)
                for decision in _decisions(evidence, MAIN, task, policy)
                if (teacher := teacher_K(decision)) is not None and decision["chosen"] in decision["candidates_K"]
            ]
            if not seen:
                _open(drawing, f"(b) {policy} on {task}: {_why(evidence, task, policy)}")
                continue
            at = [decision["candidates_K"].index(decision["chosen"]) for decision, _ in seen]
            slm = [float(np.exp(decision["logprobs_K"][i])) for (decision, _), i in zip(seen, at, strict=True)]
            judged = [float(teacher[i]) for (_, teacher), i in zip(seen, at, strict=True)]
            title = f"{policy} on {task}, {len(seen)} decisions"
            rescues = [rescued(decision) for decision, _ in seen]
            drawing.figures[f"b-{task}-{policy}"] = draw.rescue(slm, judged, rescues, title)
    return drawing


def scores(evidence: Evidence) -> Drawing:
    """Figure A5: the selector's score by the rank that the teacher gives the candidate."""
    drawing = Drawing()
    for task in evidence.tasks_of(MAIN):
        decisions = _decisions(evidence, MAIN, task, "s2t-local")
        seen = [(decision, teacher) for decision in decisions if (teacher := teacher_K(decision)) is not None]
        if not seen:
            _open(drawing, f"s2t-local on {task}: {_why(evidence, task, 's2t-local')}")
            continue
        ranked = scores_by_rank(seen)
        drawing.figures[task] = draw.score_by_rank(ranked, f"s2t-local on {task}, {len(seen)} decisions")
        drawing.rows += [
            {"task": task, "rank": rank, "median": float(np.median(values)), "candidates": len(values)}
            for rank, values in enumerate(ranked, 1)
            if values
        ]
    return drawing


def errors(evidence: Evidence) -> Drawing:
    """Eq. 12: hit and selection errors up to each step of an answer, on the states that each policy comes to itself."""
    drawing = Drawing()
    for task in evidence.tasks_of(MAIN):
        series = {}
        for policy in ("greedy", "s2t-local", "s2t", "takeover"):
            rows = evidence.rows(MAIN, task, policy)
            summed = of_answers(rows) if len(rows) else None
            if summed is None:
                asked = evidence.measure("accuracy", task, policy, (MAIN,))
                _open(drawing, f"{policy} on {task}: {asked if isinstance(asked, str) else UNAUDITED}")
                continue
            series[policy] = summed.hit_T, summed.selection_T
            for step in sorted({*range(0, len(summed.hit_T), 16), len(summed.hit_T) - 1}):
                hit, selection = float(summed.hit_T[step]), float(summed.selection_T[step])
                drawing.rows.append(
                    {"task": task, "policy": policy, "step": step + 1, "hit": hit, "selection": selection}
                )
        if series:
            drawing.figures[task] = draw.cumulated_error(series, f"{task}: errors up to a step, an answer (Eq. 12)")
    return drawing


def first_wrongs(evidence: Evidence) -> Drawing:
    """Where the wrong answers of each policy with a trigger first go wrong, by what the teacher gives their tokens."""
    drawing = Drawing()
    results = evidence.results(MAIN)
    for task in evidence.tasks_of(MAIN):
        split = {} if results is None else {p: row for (of, p), row in results.first_wrong.items() if of == task}
        drawing.rows += [dict(row) for row in split.values()]
        named = evidence.runs.given.matrix.benchmarks[MAIN].policies
        for policy in (one for one in named if variant(one) is not None and one not in split):
            asked = evidence.measure("accuracy", task, policy, (MAIN,))
            _open(drawing, f"{policy} on {task}: {asked if isinstance(asked, str) else UNAUDITED}")
        if any(row["read"] for row in split.values()):
            counts = {policy: [row[place] for place in get_args(Place)] for policy, row in split.items()}
            drawing.figures[task] = draw.first_wrong(counts, f"{task}: where wrong answers first go wrong")
    return drawing


def _ranks(evidence: Evidence) -> dict[str, np.ndarray]:
    """The teacher's ranks at the top states by KL, by task."""
    found = {task: evidence.steps(task) for task in evidence.tasks_of(STATES)}
    return {task: steps.rank_T[top_steps(steps.kl_T, TAU)] for task, steps in found.items() if steps is not None}


def _cdfs(ranks: dict[str, tuple[np.ndarray, int]], title: str, axis: str) -> Drawing:
    curves = {label: rank_cdf(rank_T, length) for label, (rank_T, length) in ranks.items()}
    rows = [
        {"of": label, "rank": rank, "share": float(share)}
        for label, shares in curves.items()
        for rank, share in enumerate(shares, 1)
    ]
    return Drawing({"": draw.rank_cdf(curves, title, axis)} if curves else {}, rows)


def _decisions(evidence: Evidence, part: str, task: str, policy: str) -> list[Decision]:
    rows = evidence.rows(part, task, policy)
    return [decision for answer in decisions_of(rows) for decision in answer] if len(rows) else []


def _why(evidence: Evidence, task: str, policy: str) -> str:
    """Why a figure shows nothing of a policy's decisions."""
    found = evidence.measure("LLM on sel.", task, policy, (MAIN,))
    return found if isinstance(found, str) else UNAUDITED


def _open(drawing: Drawing, line: str) -> None:
    if line not in drawing.left_open:
        drawing.left_open.append(line)
