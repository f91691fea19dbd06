"""An engine that adds up what its calls cost, for work whose own results say nothing of it."""

from __future__ import annotations

import numpy as np

from s2t_models.engines.contract import Draft, Engine, ModelCard, Sampling, Scores, Tell, Usage


class Metered:
    """The contract's core over `engine`, which stays whose it is: closing this does nothing."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.usage = Usage()

    async def card(self) -> ModelCard:
        return await self._engine.card()

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        draft = await self._engine.generate(prefix, sampling, tell)
        self.usage += draft.usage
        return draft

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        scores = await self._engine.score(tokens, start, ids_TN, support)
        self.usage += scores.usage
        return scores

    def close(self) -> None:
        pass
