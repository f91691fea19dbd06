"""Rollouts that the teacher rescues: the SLM writes, and where the two diverge the teacher's choice among its
candidates stands (Algorithm 1), as S2T decodes.

Drafting ahead would have the teacher read what is thrown away. The texts are those of step-by-step decoding, where it
reads each token once, and those tokens are what the labels are said to cost.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipelines.collect.actors import Labels, Rollouts, Row
from s2t_models import loading
from s2t_models.engines.contract import Finish, Support
from s2t_models.hosting import host
from s2t_models.policies import policy
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.recipe import Recipe


class RescuedRollouts(Rollouts):
    """Rollouts by S2T, which triggers at `threshold` nats of KL; the teacher is the engine that `labels` reads with."""

    def __init__(self, recipe: Recipe, labels: Labels, threshold: float) -> None:
        hosting = host(recipe.changed({"trigger.threshold": threshold}))
        super().__init__(recipe, hosting.engines["slm"])
        self.loop = labels.loop  # an engine is called from one loop
        self.policy = policy("s2t", hosting)
        running = {"slm": self.engine, "teacher": labels.engine}
        self.engines = Engines(running, loading.decoder(hosting.tokenizer), self.tokenizer.encode)

    def __call__(self, prompts: pa.Table) -> pa.Table:
        # No more at once than the teacher has slots for: it would read the prefixes of the others again.
        at_once = self.recipe.teacher.slots
        starts = range(0, len(prompts), at_once)
        return pa.concat_tables(super(RescuedRollouts, self).__call__(prompts.slice(n, at_once)) for n in starts)

    async def write(self, prompt_ids: list[int], row: Row) -> tuple[list[int], Finish, Support]:
        collect = self.recipe.collect
        asked = Request(prompt_ids, collect.max_new_tokens, row["seed"], row["temperature"] or None, collect.top_p)
        answer = await gather(self.policy.decode(self.engines, asked))
        ids_T1 = np.array(answer.ids)[:, None]
        tokens = prompt_ids + answer.ids[:-1]
        support = (await self.engine.score(tokens, len(prompt_ids), ids_T1, self.recipe.divergence.support)).support
        assert support is not None
        # Of the support alone: nothing is trained on it.
        entropy_T = -(np.exp(support.logprobs_TN) * support.logprobs_TN).sum(-1)
        return answer.ids, answer.finish, replace(support, entropy_T=entropy_T)
