"""Maj@n, self-consistency: n samples vote by their extracted answers, and a tie goes to the answer seen first."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from s2t_models.engines.contract import Usage
from s2t_models.hosting import Hosting
from s2t_models.policies.answers import answer_key
from s2t_models.policies.base import CORE, Done, Engines, Event, Needs, Policy, Request, Span, all_of, sampling
from s2t_models.policies.errors import PolicyError
from s2t_models.recipe import SamplerSettings

#: Samples of one answer at most.
MOST_VOTES = 128
_NAME = re.compile(r"maj@([1-9]\d{0,3})")


def vote(answers: Sequence[str | None]) -> int:
    """The index of the first sample that gives the majority answer. Samples without an answer have no vote."""
    counts = Counter(answer for answer in answers if answer is not None)
    # Counter keeps the order of first sight, and max takes the first of equals.
    return answers.index(max(counts, key=counts.__getitem__)) if counts else 0


@dataclass(frozen=True)
class Majority(Policy):
    """`votes` seeded samples at once. `key` reads a sample's answer from its text."""

    name: str
    sampler: SamplerSettings
    votes: int = 8
    key: Callable[[str], str | None] = answer_key

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {"slm": CORE}

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        slm = engines["slm"]
        # Requests with neighbouring seeds share no sample.
        seeds = [request.seed * self.votes + i for i in range(self.votes)]
        asked = [sampling(self.sampler, request, request.max_tokens, seed) for seed in seeds]
        drafts = await all_of(slm.generate(request.prompt, one) for one in asked)
        winner = drafts[vote([self.key(engines.decode(draft.ids)) for draft in drafts])]
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
