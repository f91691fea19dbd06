"""The error of a decoder over the steps of its answers: cumulated and split as in Eqs. 11 and 12, and where wrong
answers first go wrong.

At a triggered step the candidates are those of the decision, elsewhere the one token that was written. The reference is
the teacher's own token at each step: the shards of a collection hold it for the SLM's rollouts, an audit for answers of
policies. Axes: _T step of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from pipelines.analyse.audit import TEACHER_ARGMAX, TEACHER_ON_WRITTEN, triggering

#: An answer goes wrong at the first token that the teacher gives less than this.
UNLIKELY = 0.05
Place = Literal["at_triggered", "elsewhere", "nowhere"]


@dataclass(frozen=True)
class StepErrors:
    """Eq. 11 at each step of one answer: where the reference token was not among the candidates, and where it was and
    another token was chosen. No step is both."""

    hit_T: np.ndarray
    selection_T: np.ndarray


@dataclass(frozen=True)
class CumulatedErrors:
    """Eq. 12: the failures of either kind that an answer has had up to each step, [T], as means over `answers`."""

    hit_T: np.ndarray
    selection_T: np.ndarray
    answers: int


def step_errors(output_ids: Iterable[int], decisions: list[dict[str, Any]], argmax_T: Iterable[int]) -> StepErrors:
    """The errors of one answer against the teacher's tokens `argmax_T`."""
    written_T, reference_T = np.asarray(list(output_ids)), np.asarray(list(argmax_T))
    hit_T, selection_T = written_T != reference_T, np.zeros(len(written_T), bool)
    for decision in decisions:
        step = decision["step"]
        if step < len(written_T) and hit_T[step] and int(reference_T[step]) in decision["candidates_K"]:
            hit_T[step], selection_T[step] = False, True
    return StepErrors(hit_T, selection_T)


def cumulated(errors: Iterable[StepErrors]) -> CumulatedErrors:
    """The sums of Eq. 12 as far as the longest answer goes; an answer that has ended adds nothing more."""
    every = list(errors)
    length = max((len(one.hit_T) for one in every), default=0)
    sums = np.zeros((2, length))
    for one in every:
        sums[0, : len(one.hit_T)] += one.hit_T
        sums[1, : len(one.selection_T)] += one.selection_T
    hit_T, selection_T = sums.cumsum(-1) / max(len(every), 1)
    return CumulatedErrors(hit_T, selection_T, len(every))


def of_answers(rows: pd.DataFrame) -> CumulatedErrors | None:
    """Those of one policy's audited answers; None where the teacher was asked about none of them."""
    if TEACHER_ARGMAX not in rows:
        return None
    audited = rows[rows[TEACHER_ARGMAX].notna() & rows["output_ids"].notna()]
    if audited.empty:
        return None
    columns = (audited["output_ids"], audited["decisions"], audited[TEACHER_ARGMAX])
    return cumulated(
        step_errors(ids, json.loads(decisions), argmax_T) for ids, decisions, argmax_T in zip(*columns, strict=True)
    )


def first_wrong(on_written_T: Iterable[float], decisions: Iterable[dict[str, Any]]) -> Place:
    """Where an answer first has a token that the teacher gives less than UNLIKELY: at a triggered step, at another one,
    or nowhere. `on_written_T` are the teacher's probabilities of its tokens."""
    unlikely = np.flatnonzero(np.asarray(list(on_written_T)) < UNLIKELY)
    if not len(unlikely):
        return "nowhere"
    return "at_triggered" if int(unlikely[0]) in {decision["step"] for decision in decisions} else "elsewhere"


def first_wrongs(rows: pd.DataFrame) -> dict[str, int] | None:
    """How many of one policy's wrong answers there are (`wrong`), how many of them the teacher has read (`read`), and
    where these first go wrong (see `first_wrong`); None where there are some and it has read none of them."""
    if TEACHER_ON_WRITTEN not in rows:
        return None
    wrong = rows[rows["verdict"] == "wrong"]
    read = wrong[wrong[TEACHER_ON_WRITTEN].notna()]
    if read.empty and len(wrong):
        return None
    places = [
        first_wrong(on_written_T, json.loads(decisions))
        for on_written_T, decisions in zip(read[TEACHER_ON_WRITTEN], read["decisions"], strict=True)
    ]
    return {"wrong": len(wrong), "read": len(read)} | {place: places.count(place) for place in get_args(Place)}


def first_wrong_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each task and policy with a trigger whose wrong answers the teacher has read: `task`, `policy` and the
    counts of `first_wrongs`."""
    triggered = triggering(frame)
    return [
        {"task": task, "policy": policy} | places
        for (task, policy), rows in frame.groupby(["task", "policy"], sort=False)
        if policy in triggered and (places := first_wrongs(rows)) is not None
    ]
