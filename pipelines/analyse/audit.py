"""The teacher's view of choices that were made without it: what S2T-Local's decisions are measured against
(Tables 2 and A9), and its own token at every step of an answer (Eq. 12).

One teacher forward an answer, over the token ids that were recorded with it; answers without them (several turns,
another endpoint) are left as they were. It knows nothing of Ray or HTTP: the teacher runs in this process.
"""

from __future__ import annotations

import asyncio
import json
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
#: The column of an audited frame with the teacher's own token at every step; null where it was not asked.
TEACHER_ARGMAX = "teacher_argmax_T"


def audit(frame: pd.DataFrame, recipe: Recipe, data: Path | None) -> pd.DataFrame:
    """The rows, with the teacher's token (`argmax`) and probabilities of the candidates (`teacher_K`) in the decisions
    that were taken without it, and its token at every step of the answers of greedy decoding and of policies that
    select or may (TEACHER_ARGMAX). Raises TaskError where a task's rows are missing."""
    tokenizer = load_tokenizer(recipe.slm)
    items = {item.uid: item for name in frame["task"].unique() for item in load(name, data, recipe.prompts)[1]}
    engine = load_engine(pair(recipe)["teacher"])

    async def whole() -> list[tuple[str, list[int] | None]]:
        slots = asyncio.Semaphore(2 * recipe.teacher.slots)

        async def one(row: Any) -> tuple[str, list[int] | None]:
            async with slots:
                return await _judged(row, items[row.item].prompt, tokenizer, engine)

        return await asyncio.gather(*(one(row) for row in frame.itertuples()))

    try:
        decisions, argmax = zip(*asyncio.run(whole()), strict=True)
        return frame.assign(**{"decisions": decisions, TEACHER_ARGMAX: argmax})
    finally:
        engine.close()


async def _judged(
    row: Any, prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, engine: Engine
) -> tuple[str, list[int] | None]:
    decisions: list[Decision] = json.loads(row.decisions)
    if row.output_ids is None or not len(row.output_ids) or not (decisions or _compared(row.policy)):
        return row.decisions, None
    try:
        prompt_ids = chat.prompt_ids(tokenizer, prompt)
    except chat.ChatError:  # it was not this template that the answer was given to
        return row.decisions, None
    open_ones = [one for one in decisions if one["candidates_K"] and one["teacher_K"] is None]
    argmax_T = await judge(open_ones, prompt_ids, list(row.output_ids), engine)
    return (json.dumps(decisions) if open_ones else row.decisions), argmax_T.tolist()


def _compared(policy: str) -> bool:
    """Whether the errors of a policy's answers are looked at step by step, also where it decided nothing."""
    return policy == BASELINE or variant(policy) is not None


async def judge(decisions: list[Decision], prompt_ids: list[int], output_ids: list[int], engine: Engine) -> np.ndarray:
    """Add the teacher's view to decisions of one answer, in one call; returns its own token at every step, [T]."""
    width = max((len(decision["candidates_K"]) for decision in decisions), default=1)
    ids_TN = np.zeros((len(output_ids), width), np.int64)
    for decision in decisions:
        candidates_K = decision["candidates_K"]
        ids_TN[decision["step"], : len(candidates_K)] = candidates_K
    scores = await engine.score(prompt_ids + output_ids[:-1], len(prompt_ids), ids_TN)
    for decision in decisions:
        at, number = decision["step"], len(decision["candidates_K"])
        decision["teacher_K"] = np.exp(scores.logprobs_TN[at, :number]).tolist()
        decision["argmax"] = int(scores.argmax_T[at])
    return scores.argmax_T
