"""The teacher's view of choices that were made without it: what S2T-Local's decisions are measured against
(Tables 2 and A9), and at every step of an answer its own token (Eq. 12) and its probability of the one that was
written.

One teacher forward an answer, over the token ids that were recorded with it; answers without them (several turns,
another endpoint) are left as they were. It knows nothing of Ray or HTTP: the teacher runs in this process. `audit` asks
about all that a trigger had a part in, `read` about single answers, which is what the split of wrong answers needs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from pipelines.results.averages import BASELINE
from pipelines.tasks import load
from s2t_models import chat
from s2t_models.engines.contract import Engine
from s2t_models.engines.load import load as load_engine
from s2t_models.hosting import pair
from s2t_models.loading import load_tokenizer
from s2t_models.policies.variants import variant
from s2t_models.recipe import Recipe

Decision = dict[str, Any]
#: The messages that were asked, by item.
Prompts = Mapping[str, list[dict[str, str]]]
#: The column of an audited frame with the teacher's own token at every step; null where it was not asked.
TEACHER_ARGMAX = "teacher_argmax_T"
#: The column beside it with the teacher's probability of every token that was written.
TEACHER_ON_WRITTEN = "teacher_on_written_T"


@dataclass(frozen=True)
class TeacherView:
    """What the teacher says of the steps of an answer: its own token, and its probability of the one that was
    written."""

    argmax_T: np.ndarray
    on_written_T: np.ndarray


def prompts_of(frame: pd.DataFrame, recipe: Recipe, data: Path | None) -> Prompts:
    """What was asked in these rows, by their item. Raises TaskError where a task's rows are missing."""
    asked = set(frame["item"])
    every = (item for name in frame["task"].unique() for item in load(name, data, recipe.prompts)[1])
    return {item.uid: item.prompt for item in every if item.uid in asked}


def audit(frame: pd.DataFrame, recipe: Recipe, prompts: Prompts) -> pd.DataFrame:
    """The rows, with the teacher's token (`argmax`) and probabilities of the candidates (`teacher_K`) in the decisions
    that were taken without it, and its view of every step (TEACHER_ARGMAX, TEACHER_ON_WRITTEN) of the answers of greedy
    decoding and of policies with a trigger."""
    decisions, views = _asked(frame, {BASELINE, *triggering(frame)}, recipe, prompts)
    return frame.assign(
        **{
            "decisions": decisions,
            TEACHER_ARGMAX: [view and view.argmax_T.tolist() for view in views],
            TEACHER_ON_WRITTEN: [view and view.on_written_T.tolist() for view in views],
        }
    )


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `read` reads: wrong answers of policies with a trigger, where their token ids are known."""
    return frame[(frame["verdict"] == "wrong") & frame["policy"].isin(triggering(frame)) & frame["output_ids"].notna()]


def read(rows: pd.DataFrame, recipe: Recipe, prompts: Prompts) -> list[list[float] | None]:
    """The teacher's probability of every token that was written (TEACHER_ON_WRITTEN) of each row: what says where an
    answer first goes wrong. Choices are not judged: of wrong answers alone these would say nothing."""
    _, views = _asked(rows, set(rows["policy"]), recipe, prompts)
    return [None if view is None else view.on_written_T.tolist() for view in views]


def _asked(
    frame: pd.DataFrame, compared: set[str], recipe: Recipe, prompts: Prompts
) -> tuple[list[str], list[TeacherView | None]]:
    """For each row its decisions with the teacher's view of them, and that of its steps; the rows of policies that are
    not `compared` stay as they are."""
    tokenizer = load_tokenizer(recipe.slm)
    engine = load_engine(pair(recipe)["teacher"])

    async def whole() -> list[tuple[str, TeacherView | None]]:
        slots = asyncio.Semaphore(2 * recipe.teacher.slots)

        async def one(row: Any) -> tuple[str, TeacherView | None]:
            if row.policy not in compared:
                return row.decisions, None
            async with slots:
                return await _judged(row, prompts[row.item], tokenizer, engine)

        return await asyncio.gather(*(one(row) for row in frame.itertuples()))

    try:
        found = asyncio.run(whole())
    finally:
        engine.close()
    return [decisions for decisions, _ in found], [view for _, view in found]


def triggering(frame: pd.DataFrame) -> list[str]:
    """The policies whose decode has a trigger: their names say so, or a decision in one of their answers."""
    deciding = set(frame.loc[frame["decisions"] != "[]", "policy"])
    return [name for name in frame["policy"].unique() if name in deciding or variant(name) is not None]


async def _judged(
    row: Any, prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, engine: Engine
) -> tuple[str, TeacherView | None]:
    decisions: list[Decision] = json.loads(row.decisions)
    if row.output_ids is None or not len(row.output_ids):
        return row.decisions, None
    try:
        prompt_ids = chat.prompt_ids(tokenizer, prompt)
    except chat.ChatError:  # it was not this template that the answer was given to
        return row.decisions, None
    open_ones = [one for one in decisions if one["candidates_K"] and one["teacher_K"] is None]
    view = await judge(open_ones, prompt_ids, list(row.output_ids), engine)
    return (json.dumps(decisions) if open_ones else row.decisions), view


async def judge(decisions: list[Decision], prompt_ids: list[int], output_ids: list[int], engine: Engine) -> TeacherView:
    """Add the teacher's view to decisions of one answer, and return that of every step, in one call."""
    width = max((len(decision["candidates_K"]) for decision in decisions), default=0)
    ids_TN = np.zeros((len(output_ids), width + 1), np.int64)
    ids_TN[:, width] = output_ids
    for decision in decisions:
        candidates_K = decision["candidates_K"]
        ids_TN[decision["step"], : len(candidates_K)] = candidates_K
    scores = await engine.score(prompt_ids + output_ids[:-1], len(prompt_ids), ids_TN)
    for decision in decisions:
        at, number = decision["step"], len(decision["candidates_K"])
        decision["teacher_K"] = np.exp(scores.logprobs_TN[at, :number]).tolist()
        decision["argmax"] = int(scores.argmax_T[at])
    return TeacherView(scores.argmax_T, np.exp(scores.logprobs_TN[:, width]))
