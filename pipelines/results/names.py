"""What tables and curves call a policy: its kind, and at which K and budget it ran."""

from __future__ import annotations

from dataclasses import dataclass

from s2t_models.policies.variants import variant
from s2t_models.recipe import Recipe


@dataclass(frozen=True)
class Setting:
    """A policy without its K and budget, and these two; what the name leaves out is the recipe's."""

    kind: str
    k: int
    budget: float


def setting(policy: str, recipe: Recipe) -> Setting:
    """The policy's name taken apart, beside the recipe it ran with."""
    found = variant(policy)
    if found is None:
        return Setting(policy, recipe.candidates.k, recipe.budget)
    dynamic = found.ratio is not None
    k = found.k or (recipe.divergence.support if dynamic else recipe.candidates.k)
    return Setting(found.kind, k, recipe.budget if found.budget is None else found.budget)


def triggered(policy: str) -> bool:
    """Whether a budget and K mean something to the policy."""
    return variant(policy) is not None
