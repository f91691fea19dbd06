"""An engine that writes as an artifact does, and at its triggered steps has another model choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from s2t_models.engines.contract import Draft, Engine, ModelCard, Sampling, Scores, Selected, Tell


@dataclass(frozen=True)
class ChosenBy:
    """The engine `writer`, which holds an artifact, with the log-probabilities that `chooser` gives the candidates in
    the place of the reserved rows' scores: text, triggers and candidates are the writer's, and no leaves are scored.
    Who runs the two closes them."""

    writer: Engine
    chooser: Engine

    async def card(self) -> ModelCard:
        card = await self.writer.card()
        # A fused loop would score inside the writer.
        return replace(card, capabilities=card.capabilities - {"fused_select"})

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        return await self.writer.generate(prefix, sampling, tell)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        return await self.writer.score(tokens, start, ids_TN, support)

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        """log p of each candidate behind `prefix` under the chooser, [K], in nats, and what its forward cost."""
        scores = await self.chooser.score(prefix, len(prefix), np.array([candidates_K]))
        return Selected(scores.logprobs_TN[0], scores.usage)

    def close(self) -> None:
        pass
