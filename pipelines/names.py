"""Policies' names taken apart, as the registry of `s2t_models.policies` writes them: s2t-local-k4-w0@0.05."""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2t_models.recipe import Recipe

_VARIANT = re.compile(r"(?P<stem>.*?)(?:-k(?P<k>\d+))?(?:-w(?P<weight>[\d.]+))?(?:@(?P<budget>0?\.\d+|1(?:\.0*)?))?")


@dataclass(frozen=True)
class Variant:
    """A policy's name taken apart: what it is, and at which K and budget."""

    stem: str
    k: int
    budget: float


def variant(policy: str, recipe: Recipe) -> Variant:
    """Names as the policies' registry writes them, such as s2t-local-k4-w0@0.05; what a name leaves out is
    the recipe's."""
    found = _VARIANT.fullmatch(policy)
    if policy.startswith("maj@") or found is None:
        return Variant(policy, recipe.candidates.k, recipe.budget)
    stem = found["stem"] + (f"-w{found['weight']}" if found["weight"] else "")
    return Variant(stem, int(found["k"] or recipe.candidates.k), float(found["budget"] or recipe.budget))


def triggered(policy: str) -> bool:
    """Whether a budget and K mean something to the policy."""
    return policy.startswith(("s2t", "takeover"))
