"""Multiplex Thinking, training-free: each input is the mean embedding of several draws; the first draw is the text.

It runs inside an engine that takes embeddings as inputs; this file only names its settings.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from s2t_models.engines.contract import Multiplex
from s2t_models.policies.base import Done, Engines, Event, Request, Span, Tokens


@dataclass(frozen=True)
class MultiplexThinking:
    """One `generate_multiplex` call; `tokens` is the ordinary sampling after the early stop."""

    name: str
    multiplex: Multiplex
    tokens: Tokens
    needs: tuple[str, ...] = ("slm",)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        sampling = self.tokens.sampling(request, request.max_tokens)
        draft = await engines["slm"].generate_multiplex(request.prompt, sampling, self.multiplex)
        yield Span(draft.ids, "slm")
        yield Done(draft.finish, {"slm": draft.usage})
