"""The error of a decoder cumulated over the steps of its answers, split as in Eqs. 11 and 12.

At a triggered step the candidates are those of the decision, elsewhere the one token that was written. The reference is
the teacher's own token at each step: the shards of a collection hold it for the SLM's rollouts, an audit for answers of
policies. Axes: _T step of an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pipelines.analyse.audit import TEACHER_ARGMAX


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
