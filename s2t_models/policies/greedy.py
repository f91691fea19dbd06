"""One model decoding alone: greedy, sample, llm, kd, and any other checkpoint. It never triggers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from s2t_models.policies.base import GREEDY, Done, Engines, Event, Request, Source, Span, Tokens


@dataclass(frozen=True)
class Alone:
    """Decode with the engine named `engine`, drawing tokens as `tokens` says."""

    name: str
    engine: str = "slm"
    tokens: Tokens = GREEDY

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.engine,)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        sampling = self.tokens.sampling(request, request.max_tokens)
        draft = await engines[self.engine].generate(request.prompt, sampling)
        source: Source = "teacher" if self.engine == "teacher" else "slm"
        yield Span(draft.ids, source)
        yield Done(draft.finish, {self.engine: draft.usage})
