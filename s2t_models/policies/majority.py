"""Maj@n, self-consistency: n samples vote by their answers, and the first sample with the majority's answer is served."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from s2t_models.answers.voting import vote
from s2t_models.engines.contract import Usage
from s2t_models.policies.base import Done, Engines, Event, Request, Span, Tokens, all_of


@dataclass(frozen=True)
class Majority:
    """`n` seeded samples at once."""

    name: str
    n: int
    tokens: Tokens
    needs: tuple[str, ...] = ("slm",)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        slm = engines["slm"]
        # Requests with neighbouring seeds share no sample.
        seeds = [request.seed * self.n + i for i in range(self.n)]
        samplings = [self.tokens.sampling(request, request.max_tokens, seed) for seed in seeds]
        drafts = await all_of(slm.generate(request.prompt, sampling) for sampling in samplings)
        winner = drafts[vote([engines.decode(draft.ids) for draft in drafts], request.options)]
        usage = sum((draft.usage for draft in drafts), Usage())
        yield Span(winner.ids, "slm")
        yield Done(winner.finish, {"slm": usage}, [draft.ids for draft in drafts])
