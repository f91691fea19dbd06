"""Maj@n, self-consistency: n samples vote by their extracted answers, and a tie goes to the answer seen first."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from s2t_models.engines.contract import Usage
from s2t_models.policies.answers import answer_key
from s2t_models.policies.base import Done, Engines, Event, Request, Span, Tokens, all_of


def vote(answers: Sequence[str | None]) -> int:
    """The index of the first sample that gives the majority answer. Samples without an answer have no vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    # Counter keeps the order of first sight, and max takes the first of equals.
    return answers.index(max(counts, key=counts.__getitem__)) if counts else 0


@dataclass(frozen=True)
class Majority:
    """`n` seeded samples at once. `key` reads a sample's answer from its text."""

    name: str
    n: int
    tokens: Tokens
    key: Callable[[str], str | None] = answer_key
    needs: tuple[str, ...] = ("slm",)

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        slm = engines["slm"]
        # Requests with neighbouring seeds share no sample.
        seeds = [request.seed * self.n + i for i in range(self.n)]
        samplings = [self.tokens.sampling(request, request.max_tokens, seed) for seed in seeds]
        drafts = await all_of(slm.generate(request.prompt, sampling) for sampling in samplings)
        winner = drafts[vote([self.key(engines.decode(draft.ids)) for draft in drafts])]
        usage = sum((draft.usage for draft in drafts), Usage())
        yield Span(winner.ids, "slm")
        yield Done(winner.finish, {"slm": usage}, [draft.ids for draft in drafts])
