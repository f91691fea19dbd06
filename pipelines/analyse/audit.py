"""The teacher's view of choices that were made without it: what S2T-Local's decisions are measured against
(Tables 2 and A9).

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

from pipelines.tasks import load
from s2t_models import chat
from s2t_models.engines.contract import Engine
from s2t_models.engines.load import load as load_engine
from s2t_models.hosting import pair
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import Recipe

Decision = dict[str, Any]


def audit(frame: pd.DataFrame, recipe: Recipe, data: Path | None) -> pd.DataFrame:
    """The rows, with the teacher's token (`argmax`) and probabilities of the candidates (`teacher_K`) in the
    decisions that were taken without it. Raises TaskError where a task's rows are missing."""
    tokenizer = load_tokenizer(recipe.slm)
    items = {item.uid: item for name in frame["task"].unique() for item in load(name, data, recipe.prompts)[1]}
    engine = load_engine(pair(recipe)["teacher"])

    async def whole() -> list[str]:
        slots = asyncio.Semaphore(2 * recipe.teacher.slots)

        async def one(row: Any) -> str:
            async with slots:
                return await _judged(row, items[row.item].prompt, tokenizer, engine)

        return await asyncio.gather(*(one(row) for row in frame.itertuples()))

    try:
        return frame.assign(decisions=asyncio.run(whole()))
    finally:
        engine.close()


async def _judged(row: Any, prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, engine: Engine) -> str:
    decisions: list[Decision] = json.loads(row.decisions)
    open_ones = [one for one in decisions if one["candidates_K"] and one["teacher_K"] is None]
    if not open_ones or row.output_ids is None:
        return row.decisions
    try:
        prompt_ids = chat.prompt_ids(tokenizer, prompt)
    except chat.ChatError:  # it was not this template that the answer was given to
        return row.decisions
    await judge(open_ones, prompt_ids, list(row.output_ids), engine)
    return json.dumps(decisions)


async def judge(decisions: list[Decision], prompt_ids: list[int], output_ids: list[int], engine: Engine) -> None:
    """Add the teacher's view to decisions of one answer, in order of step, in one call."""
    first, last = decisions[0]["step"], decisions[-1]["step"]
    width = max(len(decision["candidates_K"]) for decision in decisions)
    ids_TN = np.zeros((last - first + 1, width), np.int64)
    for decision in decisions:
        candidates_K = decision["candidates_K"]
        ids_TN[decision["step"] - first, : len(candidates_K)] = candidates_K
    scores = await engine.score(prompt_ids + output_ids[:last], len(prompt_ids) + first, ids_TN)
    for decision in decisions:
        at, number = decision["step"] - first, len(decision["candidates_K"])
        decision["teacher_K"] = np.exp(scores.logprobs_TN[at, :number]).tolist()
        decision["argmax"] = int(scores.argmax_T[at])
