"""Maj@n, self-consistency: n samples vote by their answers, and the first sample with the majority's answer is
served."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import ClassVar

from s2t_models.answers.voting import vote
from s2t_models.engines.contract import Draft, Sampling, Usage
from s2t_models.hosting import Hosting
from s2t_models.policies.base import CORE, Done, Engines, Event, Needs, Policy, Request, Span, all_of, sampling
from s2t_models.policies.errors import PolicyError
from s2t_models.settings import SamplerSettings

#: Samples of one answer at most.
MOST_VOTES = 128
_NAME = re.compile(r"maj@([1-9]\d{0,3})")


@dataclass(frozen=True)
class Majority(Policy):
    """`votes` seeded samples at once."""

    name: str
    sampler: SamplerSettings
    votes: int = 8
    decodes_many: ClassVar[bool] = True
    takes_penalties: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {"slm": CORE}

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        # Requests with neighbouring seeds share no sample.
        seeds = [request.seed * self.votes + i for i in range(self.votes)]
        asked = [sampling(self.sampler, request, request.max_tokens, seed) for seed in seeds]

        async def sample(one: Sampling) -> Draft:
            async with engines.place(self.needs) as placed:
                return await placed["slm"].generate(request.prompt, one)

        def elected(drafts: list[Draft]) -> Draft:
            return drafts[vote([engines.decode(draft.ids) for draft in drafts], request.options)]

        drafts = await all_of(sample(one) for one in asked)
        # Reading answers takes a while where there are many: not on the loop, which others share.
        winner = await asyncio.to_thread(elected, drafts)
        usage = sum((draft.usage for draft in drafts), Usage())
        yield Span(winner.ids, "slm")
        yield Done(winner.finish, {"slm": usage}, [draft.ids for draft in drafts])


def names(hosting: Hosting) -> list[str]:
    return [f"maj@{hosting.recipe.policies.majority.votes}"]


def build(name: str, hosting: Hosting) -> Policy | None:
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    if (votes := int(found[1])) > MOST_VOTES:
        raise PolicyError(f"{name}: at most {MOST_VOTES} samples vote")
    return Majority(name, hosting.recipe.policies.sample, votes)
