"""Policies by name: the name a policy is served under says what it is, with which settings, at which budget.

    greedy  sample  maj@8  llm  llm-sample  specreason  multiplex  r2r  kd  <any checkpoint of the recipe>
    s2t[-entropy|-random][-dynamic-05][-k4][@0.05]   takeover[-entropy|-random][@0.05]   s2t-local[-w0][-k4][@0.05]

`@0.05` is the budget tau, by default the recipe's; `-dynamic-05` keeps candidates at least 5% as likely as the top one.
The registry knows recipes and thresholds, not engines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from s2t_models.engines.contract import Multiplex, Selection
from s2t_models.errors import UserError
from s2t_models.policies.base import Policy, Tokens
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.greedy import Alone
from s2t_models.policies.local import Local
from s2t_models.policies.majority import Majority
from s2t_models.policies.multiplex import MultiplexThinking
from s2t_models.policies.r2r import RouterTrigger
from s2t_models.policies.specreason import SpecReason
from s2t_models.policies.triggers import DivergenceTrigger, EntropyTrigger, RandomTrigger, Trigger
from s2t_models.policies.variants import Variant, variant
from s2t_models.recipe import MOST_CANDIDATES, Recipe

#: metric ("kl", "entropy", "head") -> budget -> the threshold that triggers that share of calibration steps.
Thresholds = Mapping[str, Mapping[float, float]]

_MAJORITY = re.compile(r"maj@([1-9]\d{0,3})")
#: Samples of one answer at most.
MOST_VOTES = 128


class PolicyError(UserError):
    """A policy that cannot be had; the message is one line saying which and why."""


def names(recipe: Recipe, thresholds: Thresholds) -> list[str]:
    """The policies that can be had as things stand; budgets and settings can be added to the names (see above)."""
    budget = recipe.budget

    def has(metric: str) -> bool:
        fixed = metric == recipe.trigger.metric and recipe.trigger.threshold is not None
        return fixed or budget in thresholds.get(metric, {})

    found = ["greedy", "sample", f"maj@{recipe.policies.votes}", "llm", "llm-sample"]
    metrics = [metric for metric in ("kl", "entropy", "random") if metric == "random" or has(metric)]
    if recipe.trigger.metric in metrics:
        found += ["takeover", "s2t", "s2t-dynamic-01", "s2t-dynamic-05"]
    found += [
        f"{stem}-{metric}" for metric in metrics for stem in ("takeover", "s2t") if metric != recipe.trigger.metric
    ]
    if has("head"):
        found += ["s2t-local", "s2t-local-w0"]
    if recipe.router.path is not None:
        found.append("r2r")
    return [*found, "specreason", "multiplex", *dict.fromkeys(["kd", *recipe.checkpoints])]


def policies(recipe: Recipe, thresholds: Thresholds) -> dict[str, Policy]:
    """Every policy of `names`, by name."""
    return {name: policy(name, recipe, thresholds) for name in names(recipe, thresholds)}


def policy(name: str, recipe: Recipe, thresholds: Thresholds) -> Policy:
    """The policy of that name. Raises PolicyError where there is no such policy, threshold or router."""
    settings = recipe.policies
    own = Tokens(settings.sample_temperature, settings.sample_top_p, settings.sample_top_k)
    match name:
        case "greedy":
            return Alone(name)
        case "sample":
            return Alone(name, tokens=own)
        case "llm":
            return Alone(name, "teacher")
        case "llm-sample":
            return Alone(name, "teacher", Tokens(settings.llm_temperature, settings.llm_top_p))
        case "r2r":
            return _r2r(name, recipe)
        case "specreason":
            return SpecReason(
                name,
                accept=settings.specreason_accept,
                delimiter=settings.specreason_delimiter,
                step_tokens=settings.specreason_step_tokens,
                score=settings.specreason_score,
                tokens=Tokens(settings.specreason_temperature, settings.specreason_top_p),
                chunk=settings.chunk,
            )
        case "multiplex":
            multiplex = Multiplex(
                settings.multiplex_width,
                settings.multiplex_temperature,
                settings.multiplex_weighted,
                settings.multiplex_entropy,
                settings.multiplex_patience,
            )
            return MultiplexThinking(name, multiplex, own)
    if name == "kd" or name in recipe.checkpoints:
        return Alone(name, name)
    if found := _MAJORITY.fullmatch(name):
        if int(found[1]) > MOST_VOTES:
            raise PolicyError(f"{name}: at most {MOST_VOTES} samples vote")
        return Majority(name, int(found[1]), own)
    if (said := variant(name)) and (built := _triggered(name, said, recipe, thresholds)):
        return built
    known = ", ".join(names(recipe, thresholds))
    raise PolicyError(
        f"no policy named {name!r}; there are: {known}; maj@N takes any N, s2t and takeover a budget as @0.05"
    )


def _triggered(name: str, found: Variant, recipe: Recipe, thresholds: Thresholds) -> Policy | None:
    """None where the name asks for what its kind of policy has not got."""
    candidates = recipe.candidates
    if found.k and found.k > MOST_CANDIDATES:
        raise PolicyError(f"{name}: a step has at most {MOST_CANDIDATES} candidates")
    if found.k:
        candidates = candidates.model_copy(update={"k": found.k})
    if found.ratio is not None:
        # As far as the support reaches: the ratio alone sizes the set (Table A4).
        dynamic = {"ratio": found.ratio, "method": "top_k", "k": found.k or recipe.divergence.support}
        candidates = candidates.model_copy(update=dynamic)
    if found.stem == "s2t-local":
        if found.metric or found.ratio is not None:
            return None
        return Local(
            name,
            Selection(
                threshold=_threshold(name, "head", found.budget, recipe, thresholds),
                k=candidates.k,
                method=candidates.method,
                ratio=candidates.ratio,
                prior_weight=recipe.policies.local_prior_weight if found.weight is None else found.weight,
                temperature=recipe.distil.temperature,
                warmup=recipe.trigger.warmup,
            ),
        )
    if found.weight is not None or (found.stem == "takeover" and (found.k or found.ratio is not None)):
        return None
    return Collaborate(
        name,
        _trigger(name, found.metric or recipe.trigger.metric, found.budget, recipe, thresholds),
        "candidates" if found.stem == "s2t" else "vocabulary",
        candidates,
        recipe.divergence.support,
        recipe.policies.chunk,
        recipe.trigger.warmup,
    )


def _trigger(name: str, metric: str, budget: float | None, recipe: Recipe, thresholds: Thresholds) -> Trigger:
    if metric == "random":
        return RandomTrigger(_budget(name, budget, recipe))
    threshold = _threshold(name, metric, budget, recipe, thresholds)
    return EntropyTrigger(threshold) if metric == "entropy" else DivergenceTrigger(threshold, recipe.divergence.tail)


def _budget(name: str, budget: float | None, recipe: Recipe) -> float:
    value = recipe.budget if budget is None else budget
    if not 0 < value <= 1:
        raise PolicyError(f"{name}: a budget is a share of the steps above 0 and up to 1")
    return value


def _threshold(name: str, metric: str, budget: float | None, recipe: Recipe, thresholds: Thresholds) -> float:
    if budget is None and metric == recipe.trigger.metric and recipe.trigger.threshold is not None:
        return recipe.trigger.threshold
    wanted = _budget(name, budget, recipe)
    known = thresholds.get(metric, {})
    if wanted in known:
        return known[wanted]
    calibrated = (
        ", ".join(f"{tau:g}" for tau in known)
        or "none (set trigger.calibration to what `s2t collect` wrote, or trigger.threshold)"
    )
    raise PolicyError(f"{name}: no {metric} threshold for budget {wanted:g}; calibrated budgets: {calibrated}")


def _r2r(name: str, recipe: Recipe) -> Policy:
    if recipe.router.path is None:
        raise PolicyError(f"{name}: router.path is not set; `s2t distil --objective router` trains one")
    return Collaborate(
        name,
        RouterTrigger(Path(recipe.router.path)),
        "vocabulary",
        recipe.candidates,
        recipe.divergence.support,
        recipe.policies.chunk,
    )
