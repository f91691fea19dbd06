"""Rollouts that the teacher rescues: the SLM writes, and where the two diverge the teacher's choice among its
candidates stands (Algorithm 1), as S2T decodes.

Drafting ahead would have the teacher read what is thrown away. The texts are those of step-by-step decoding, where it
reads each token once, and those tokens are what the labels are said to cost.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.collect.schemas import ROLLOUT
from s2t_models import chat, loading
from s2t_models.engines.load import load
from s2t_models.hosting import host
from s2t_models.policies import policy
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.recipe import Recipe

Row = dict[str, Any]


class RescuedRollouts:
    """Rollouts of a batch of prompts by S2T, which triggers at `threshold` nats of KL."""

    def __init__(self, recipe: Recipe, threshold: float) -> None:
        self.recipe = recipe.changed({"trigger.threshold": threshold})
        hosting = host(self.recipe)
        self.policy = policy("s2t", hosting)
        self.tokenizer = loading.load_tokenizer(hosting.tokenizer)
        running = {name: load(hosting.engines[name]) for name in ("slm", "teacher")}
        self.engines = Engines(running, loading.decoder(hosting.tokenizer), self.tokenizer.encode)
        self.loop = asyncio.new_event_loop()

    def __call__(self, prompts: pa.Table) -> pa.Table:
        rows, at_once, made = prompts.to_pylist(), self.recipe.teacher.slots, list[Row]()
        for start in range(0, len(rows), at_once):
            made += self.loop.run_until_complete(self._together(rows[start : start + at_once]))
        return pa.Table.from_pylist(made, ROLLOUT)

    async def roll_out(self, row: Row) -> Row:
        prompt = chat.render(self.tokenizer, json.loads(row["messages"]))
        ids, collect = chat.encode(self.tokenizer, prompt), self.recipe.collect
        asked = Request(ids, collect.max_new_tokens, row["seed"], row["temperature"] or None, collect.top_p)
        answer = await gather(self.policy.decode(self.engines, asked))
        tokens, output_T1 = ids + answer.ids[:-1], np.array(answer.ids)[:, None]
        read = await self.engines["slm"].score(tokens, len(ids), output_T1, self.recipe.divergence.support)
        assert read.support is not None
        logprobs_TN = read.support.logprobs_TN
        return row | {
            "prompt": prompt,
            "prompt_ids": ids,
            "output_ids": answer.ids,
            "finish": answer.finish,
            "entropy_T": -(np.exp(logprobs_TN) * logprobs_TN).sum(-1),  # of the support: nothing is trained on it
            "support_ids": read.support.ids_TN.ravel(),
            "support_logprobs": logprobs_TN.ravel(),
        }

    def close(self) -> None:
        for engine in self.engines.by_name.values():
            engine.close()
        self.loop.close()

    async def _together(self, rows: list[Row]) -> list[Row]:
        return list(await asyncio.gather(*(self.roll_out(row) for row in rows)))
