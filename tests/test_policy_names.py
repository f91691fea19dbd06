"""A policy's name says what it is: the registry from names to settings, and its one-line refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_models.engines.contract import Multiplex, Selection
from s2t_models.policies import PolicyError, Thresholds, names, policies, policy
from s2t_models.policies.base import Tokens
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.greedy import Alone
from s2t_models.policies.local import Local
from s2t_models.policies.majority import Majority
from s2t_models.policies.multiplex import MultiplexThinking
from s2t_models.policies.r2r import RouterTrigger
from s2t_models.policies.triggers import DivergenceTrigger, EntropyTrigger, RandomTrigger
from s2t_models.recipe import Recipe

THRESHOLDS: Thresholds = {
    "kl": {0.01: 3.0, 0.05: 2.0, 0.1: 1.0},
    "entropy": {0.01: 1.5},
    "head": {0.01: 4.0, 0.2: -1.0},
}
MODEL = {"path": "embedded:slm"}
RECIPE = Recipe.model_validate({"name": "pair", "slm": MODEL, "teacher": MODEL, "checkpoints": {"distilled": "x"}})
ROUTED = RECIPE.model_copy(update={"router": RECIPE.router.model_copy(update={"path": "folder"})})


def get(name: str, **changes) -> object:
    return policy(name, RECIPE.model_copy(update=changes), THRESHOLDS)


def test_every_listed_policy_can_be_had_under_its_name():
    listed = policies(ROUTED, THRESHOLDS)
    assert list(listed) == names(ROUTED, THRESHOLDS)
    assert all(built.name == name for name, built in listed.items())
    assert set(listed) == {
        *("greedy", "sample", "maj@8", "llm", "llm-sample", "takeover", "s2t", "s2t-dynamic-01", "s2t-dynamic-05"),
        *("takeover-entropy", "s2t-entropy", "takeover-random", "s2t-random", "s2t-local", "s2t-local-w0", "r2r"),
        *("specreason", "multiplex", "kd", "distilled"),
    }
    assert {name for built in listed.values() for name in built.needs} == {
        *("slm", "teacher", "s2t-local", "kd", "distilled"),
    }


def test_without_thresholds_only_what_needs_none_is_listed():
    listed = names(RECIPE, {})
    assert "s2t" not in listed
    assert "s2t-local" not in listed
    assert "r2r" not in listed
    assert {"s2t-random", "greedy", "maj@8"} <= set(listed)


def test_settings_come_from_the_recipe_with_the_published_defaults():
    assert get("sample") == Alone("sample", "slm", Tokens(0.7, 0.8, 20))
    assert get("llm-sample") == Alone("llm-sample", "teacher", Tokens(0.6, 0.95, 0))
    assert get("distilled") == Alone("distilled", "distilled")
    assert get("maj@3") == Majority("maj@3", 3, Tokens(0.7, 0.8, 20))
    assert get("multiplex") == MultiplexThinking("multiplex", Multiplex(3, 1.0, True, 0.1, 256), Tokens(0.7, 0.8, 20))
    specreason = policy("specreason", RECIPE, {})
    assert (specreason.accept, specreason.step_tokens, specreason.delimiter) == (7, 512, "\n\n")  # type: ignore[attr-defined]


def test_names_carry_metric_budget_and_candidates():
    assert get("s2t") == Collaborate("s2t", DivergenceTrigger(3.0), "candidates", RECIPE.candidates, 64, 16, 0)
    assert get("takeover@0.10").trigger == DivergenceTrigger(1.0)  # type: ignore[attr-defined]
    assert get("takeover@0.10").selects == "vocabulary"  # type: ignore[attr-defined]
    assert get("s2t-entropy").trigger == EntropyTrigger(1.5)  # type: ignore[attr-defined]
    assert get("takeover-random@0.07").trigger == RandomTrigger(0.07)  # type: ignore[attr-defined]
    four = get("s2t-k4@0.05")
    assert (four.candidates.k, four.trigger) == (4, DivergenceTrigger(2.0))  # type: ignore[attr-defined]
    dynamic = get("s2t-dynamic-05").candidates  # type: ignore[attr-defined]
    assert (dynamic.ratio, dynamic.method, dynamic.k) == (0.05, "top_k", 64)


def test_local_takes_the_prior_weight_from_the_recipe_or_the_name():
    weighted = RECIPE.policies.model_copy(update={"local_prior_weight": 2.0})
    expected = Selection(4.0, 8, "multinomial", 0.0, 2.0, 0.1, 0)
    assert get("s2t-local", policies=weighted) == Local("s2t-local", expected)
    assert get("s2t-local-w0", policies=weighted).selection.prior_weight == 0  # type: ignore[attr-defined]
    other = get("s2t-local-k4-w0.5@0.2").selection  # type: ignore[attr-defined]
    assert (other.k, other.prior_weight, other.threshold) == (4, 0.5, -1.0)


def test_the_published_variant_is_settings_alone():
    published = Recipe.model_validate({"name": "pair", "slm": MODEL, "teacher": MODEL, "published": True})
    built = policy("s2t@0.05", published, THRESHOLDS)
    assert built == Collaborate(
        "s2t@0.05", DivergenceTrigger(2.0, "renormalised"), "candidates", published.candidates, 64, 16, warmup=3
    )
    assert published.candidates.method == "top_k"


def test_a_threshold_in_the_recipe_needs_no_calibration():
    fixed = RECIPE.trigger.model_copy(update={"threshold": 0.7})
    recipe = RECIPE.model_copy(update={"trigger": fixed})
    assert "s2t" in names(recipe, {})
    assert policy("s2t", recipe, {}).trigger == DivergenceTrigger(0.7)  # type: ignore[attr-defined]


def test_r2r_is_takeover_by_a_router():
    built = policy("r2r", ROUTED, {})
    assert isinstance(built, Collaborate)
    assert (built.trigger, built.selects) == (RouterTrigger(Path("folder")), "vocabulary")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s2t-lokal", "no policy named 's2t-lokal'; there are: greedy, sample, maj@8, llm"),
        ("maj@0", "no policy named 'maj@0'"),
        ("takeover-k4", "no policy named 'takeover-k4'"),
        ("s2t-w0", "no policy named 's2t-w0'"),
        ("s2t@0.2", "s2t@0.2: no kl threshold for budget 0.2; calibrated budgets: 0.01, 0.05, 0.1"),
        ("s2t-local@0.05", "no head threshold for budget 0.05; calibrated budgets: 0.01, 0.2"),
        ("s2t-random@2", "s2t-random@2: a budget is a share of the steps above 0 and up to 1"),
        ("r2r", "r2r: router.path is not set; `s2t distil --objective router` trains one"),
    ],
)
def test_refusals_are_one_line(name, message):
    with pytest.raises(PolicyError) as refused:
        policy(name, RECIPE, THRESHOLDS)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
