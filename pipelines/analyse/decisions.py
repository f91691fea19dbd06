"""What the decisions in results say about selection: tables and figures from graded rows.

The error split of Eq. 11 and its sum over steps (Eq. 12), how many candidates there were and how often the teacher's
token was one of them (Tables A4, A15), rescues (Figure 4), the rank of what was selected (Figure A4), a scorer's
agreement with the teacher (Tables 2 and A9, Figure A5), answers that agree with the teacher at every step against the
others (section F.6), where wrong answers first go wrong, and accuracy over K and tau. What needs the teacher's view of
a decision counts only decisions that carry it: those of s2t and takeover do, those of s2t-local once `audit` has asked
the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from pipelines.analyse.errors import CumulatedErrors, Place, first_wrong_rows, of_answers
from pipelines.analyse.sufficiency import alignment, entropy, error_split, rank_cdf
from pipelines.data.text import file_stem
from pipelines.results import figures as draw
from pipelines.results.statistics import wilson
from pipelines.results.summary import summarise
from s2t_models.candidates import is_rescue

Decision = dict[str, Any]
Tables = dict[str, list[dict[str, Any]]]
Results = Sequence[tuple[pd.DataFrame, Mapping[str, str]]]
MAX_RANKS = 8


def decisions_of(rows: pd.DataFrame) -> list[list[Decision]]:
    """The decisions of each answer that had candidates to choose from."""
    return [[decision for decision in json.loads(text) if decision["candidates_K"]] for text in rows["decisions"]]


def teacher_K(decision: Decision) -> np.ndarray | None:
    """The teacher's probabilities of the candidates, where it was asked: while decoding, or by `audit`."""
    return None if decision["teacher_K"] is None else np.asarray(decision["teacher_K"], float)


def tables(results: Results) -> Tables:
    """Tables by name, as rows, each with its task and policy: decisions, agreement, where wrong answers first go wrong,
    accuracy (over K and tau)."""
    out: Tables = {"decisions": [], "agreement": [], "first_wrong": [], "accuracy": []}
    for frame, _ in results:
        out["first_wrong"] += first_wrong_rows(frame)
        for summary in summarise(frame):
            if summary.budget is not None:
                out["accuracy"].append(
                    {
                        "task": summary.task,
                        "policy": summary.kind,
                        "k": summary.k,
                        "tau": summary.budget,
                        "accuracy": summary.accuracy,
                        "low": summary.low,
                        "high": summary.high,
                        "items": summary.items,
                    }
                )
        for (task, policy), rows in frame.groupby(["task", "policy"], sort=False):
            name = {"task": task, "policy": policy}
            answers = decisions_of(rows)
            if not any(answers):
                continue
            out["decisions"].append(name | _decision_row(answers, rows["tokens"].sum()))
            out["agreement"] += [name | row for row in _agreement(answers, (rows["verdict"] == "correct").tolist())]
    return out


def _decision_row(answers: Sequence[Sequence[Decision]], tokens: int) -> dict[str, Any]:
    """One policy's decisions: how often it triggered and rescued, probabilities and entropies on selected
    tokens, and against the teacher Agree@1 (among the candidates), Kendall, Spearman, and Eq. 11."""
    every = [decision for answer in answers for decision in answer]
    seen = [(decision, teacher) for decision in every if (teacher := teacher_K(decision)) is not None]
    split = error_split(
        [decision["candidates_K"] for decision, _ in seen],
        [decision["chosen"] for decision, _ in seen],
        [decision["argmax"] for decision, _ in seen],
    )
    order = alignment([decision["preferences_K"] for decision, _ in seen], [teacher for _, teacher in seen])
    return {
        "decisions": len(every),
        "with_teacher": len(seen),
        "candidates": _mean([float(len(decision["candidates_K"])) for decision in every]),
        "hit": _mean([float(decision["argmax"] in decision["candidates_K"]) for decision, _ in seen]),
        "trigger_rate": len(every) / tokens if tokens else 0.0,
        "rescues": _mean([float(rescued(decision)) for decision in every]),
        "agree_at_1": order.agree_at_1,
        "kendall": order.kendall,
        "spearman": order.spearman,
        "hit_error": split.hit,
        "selection_error": split.selection,
        "slm_on_selected": _mean([_at(np.exp(decision["logprobs_K"]), decision) for decision in every]),
        "teacher_on_selected": _mean([_at(teacher, decision) for decision, teacher in seen]),
        "score_on_selected": _mean([_at(decision["scores_K"], decision) for decision in every]),
        "slm_entropy": _mean([entropy(np.exp(decision["logprobs_K"])) for decision in every]),
        "teacher_entropy": _mean([entropy(teacher) for _, teacher in seen]),
        "score_entropy": _mean([entropy(decision["scores_K"]) for decision in every]),
    }


def _at(values_K: Sequence[float] | np.ndarray, decision: Decision) -> float:
    """The chosen token's value; NaN where a takeover chose a token outside the candidates."""
    candidates_K = decision["candidates_K"]
    return float(values_K[candidates_K.index(decision["chosen"])]) if decision["chosen"] in candidates_K else np.nan


def rescued(decision: Decision) -> bool:
    """Whether the chosen token is not the SLM's own top-1 among the candidates."""
    return is_rescue(decision["candidates_K"], decision["logprobs_K"], decision["chosen"])


def _mean(values: Sequence[float]) -> float:
    return float(np.nanmean(values)) if len(values) and not np.all(np.isnan(values)) else float("nan")


def _agreement(answers: Sequence[Sequence[Decision]], correct: Sequence[bool]) -> list[dict[str, Any]]:
    """Accuracy of the answers whose every choice was the teacher's best candidate, and of those with a
    disagreement; and how the number of disagreements goes with correctness (section F.6)."""
    counts, right = [], []
    for answer, verdict in zip(answers, correct, strict=True):
        seen = [(decision, teacher) for decision in answer if (teacher := teacher_K(decision)) is not None]
        if seen:
            counts.append(sum(_at(teacher, decision) < teacher.max() for decision, teacher in seen))
            right.append(verdict)
    counted, verdicts = np.asarray(counts), np.asarray(right, bool)
    rho, p = float("nan"), float("nan")
    if len(set(counts)) > 1 and len(set(right)) > 1:
        test = spearmanr(counted, verdicts)
        rho, p = float(test.statistic), float(test.pvalue)
    rows = []
    for name, mask in (("agree", counted == 0), ("disagree", counted > 0)):
        number = int(mask.sum()) if len(counted) else 0
        if number:
            hit = int(verdicts[mask].sum())
            low, high = wilson(hit, number)
            rows.append(
                {
                    "group": name,
                    "answers": number,
                    "accuracy": hit / number,
                    "low": low,
                    "high": high,
                    "rho": rho,
                    "p": p,
                }
            )
    return rows


def figures(results: Results, rows: Tables) -> dict[str, Figure]:
    """Figures by file name, for each policy with decisions that the teacher has seen."""
    drawn: dict[str, Figure] = {}
    ranks: dict[str, dict[str, np.ndarray]] = {}
    errors: dict[str, dict[str, CumulatedErrors]] = {}
    for frame, _ in results:
        for (task, policy), part in frame.groupby(["task", "policy"], sort=False):
            if (summed := of_answers(part)) is not None:
                errors.setdefault(str(task), {})[str(policy)] = summed
            every = [decision for answer in decisions_of(part) for decision in answer]
            if selected := selected_ranks(every):
                ranks.setdefault(str(task), {})[str(policy)] = rank_cdf(np.array(selected), max(selected) + 1)
            seen = [(decision, teacher) for decision in every if (teacher := teacher_K(decision)) is not None]
            if not seen:
                continue
            title, stem = f"{policy} on {task}, {len(seen)} decisions", f"{task}-{file_stem(str(policy))}"
            inside = [(d, t) for d, t in seen if d["chosen"] in d["candidates_K"]]
            drawn[f"{stem}-rescue.png"] = draw.rescue(
                [_at(np.exp(d["logprobs_K"]), d) for d, _ in inside],
                [_at(t, d) for d, t in inside],
                [rescued(d) for d, _ in inside],
                title,
            )
            drawn[f"{stem}-score-by-rank.png"] = draw.score_by_rank(scores_by_rank(seen), title)
    for task, series in ranks.items():
        drawn[f"{task}-selected-rank-cdf.png"] = draw.rank_cdf(series, f"Rank of the selected token: {task}", SELECTED)
    for task, curves in errors.items():
        drawn[f"{task}-cumulated-error.png"] = draw.cumulated_error(
            {policy: (one.hit_T, one.selection_T) for policy, one in curves.items()},
            f"Errors up to a step, an answer (Eq. 12): {task}",
        )
    for task in dict.fromkeys(row["task"] for row in rows["first_wrong"]):
        counts = {
            row["policy"]: [row[place] for place in get_args(Place)]
            for row in rows["first_wrong"]
            if row["task"] == task and row["read"]
        }
        if counts:
            drawn[f"{task}-first-wrong.png"] = draw.first_wrong(counts, f"Where wrong answers first go wrong: {task}")
    split = [
        (f"{row['policy']}\n{row['task']}", row["hit_error"], row["selection_error"])
        for row in rows["decisions"]
        if row["with_teacher"]
    ]
    if split:
        drawn["decision-error-split.png"] = draw.error_split(split, "Error at triggered steps (Eq. 11)")
    if rows["agreement"]:
        points = [
            draw.Point(f"{row['policy']}\n{row['group']}", row["accuracy"], row["low"], row["high"])
            for row in rows["agreement"]
        ]
        drawn["agreement.png"] = draw.groups(points, "Answers that agree with the teacher at every step, and others")
    return drawn | _sweeps(rows["accuracy"])


#: The axis of ranks that are those of selected tokens (Figure A4).
SELECTED = "rank of the selected token in the SLM's order"


def selected_ranks(decisions: Sequence[Decision]) -> list[int]:
    """The 0-based ranks of the chosen tokens in the SLM's order of the candidates; of drawn candidates that is the
    least that the rank among all tokens can be. What was chosen outside them is left out."""
    return [d["candidates_K"].index(d["chosen"]) for d in decisions if d["chosen"] in d["candidates_K"]]


def scores_by_rank(seen: Sequence[tuple[Decision, np.ndarray]]) -> list[list[float]]:
    """The scorer's scores by the rank the teacher gives the candidate: a list a rank, from the best."""
    ranked: list[list[float]] = [[] for _ in range(MAX_RANKS)]
    for decision, teacher in seen:
        for rank, place in enumerate(np.argsort(-teacher, kind="stable")[:MAX_RANKS]):
            ranked[rank].append(float(decision["scores_K"][place]))
    return ranked


def _sweeps(accuracies: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Accuracy over tau (K held) and over K (tau held), where several values were run."""
    drawn = {}
    for task in dict.fromkeys(row["task"] for row in accuracies):
        for axis, held, label in (("tau", "k", "budget tau, %"), ("k", "tau", "candidates K")):
            lines: dict[str, dict[float, Any]] = {}
            for row in accuracies:
                if row["task"] == task and row[axis] is not None:
                    name = row["policy"] if row[held] is None else f"{row['policy']}, {held} = {row[held]:g}"
                    x = float(row[axis])
                    lines.setdefault(name, {})[x] = draw.Point(name, row["accuracy"], row["low"], row["high"], x)
            series = {name: list(points.values()) for name, points in lines.items() if len(points) > 1}
            if series:
                drawn[f"{task}-accuracy-over-{axis}.png"] = draw.accuracy_over(
                    series, label, f"{task}", percent=axis == "tau"
                )
    return drawn
