"""The teacher's view of choices that were made without it: what S2T-Local's decisions are measured against
(Tables 2 and A9).

One teacher forward an answer. The output's token ids are read back from its text; an answer whose text does
not give back the very tokens its decisions chose is left as it was. It knows nothing of Ray or HTTP: the
teacher runs in this process.
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
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import Recipe
from s2t_models.reserved import reserved_rows

Decision = dict[str, Any]


def audit(frame: pd.DataFrame, recipe: Recipe, data: Path | None) -> pd.DataFrame:
    """The rows, with the teacher's token (`argmax`) and probabilities of the candidates (`teacher_K`) in the
    decisions of s2t-local. Raises TaskError where a task's rows are missing."""
    tokenizer = load_tokenizer(recipe.slm)
    items = {item.uid: item for name in frame["task"].unique() for item in load(name, data)[1]}
    engine = TorchEngine.load(recipe.teacher, "teacher", reserved_rows(recipe))

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
    if not row.policy.startswith("s2t-local") or not decisions:
        return row.decisions
    prompt_ids, output_ids = chat.prompt_ids(tokenizer, prompt), chat.encode(tokenizer, row.output)
    await judge(decisions, prompt_ids, output_ids, engine)
    return json.dumps(decisions)


async def judge(decisions: list[Decision], prompt_ids: list[int], output_ids: list[int], engine: Engine) -> bool:
    """Add the teacher's view to one answer's decisions, in one call; False, and nothing added, where the ids
    are not the ones the decisions chose (the end token may be missing at the end)."""
    ends = [decision for decision in decisions if decision["step"] == len(output_ids)]
    inner = [decision for decision in decisions if decision["step"] < len(output_ids)]
    if len(ends) + len(inner) < len(decisions) or any(output_ids[d["step"]] != d["chosen"] for d in inner):
        return False
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
    return True
