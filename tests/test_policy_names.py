"""A policy's name says what it is: the registry from names to settings, and its one-line refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from s2t_models.engines.contract import Selection
from s2t_models.hosting import Hosted, Hosting, NamedArtifact
from s2t_models.policies import PolicyError, lacking, names, offer, policy
from s2t_models.policies.collaborate import Collaborate
from s2t_models.policies.local import Local
from s2t_models.policies.majority import Majority
from s2t_models.policies.multiplex import MultiplexThinking
from s2t_models.policies.r2r import RouterTrigger
from s2t_models.policies.scorers import SelectorScorer, TeacherScorer
from s2t_models.policies.single import SingleModel
from s2t_models.policies.tah import ThinkAtHard
from s2t_models.policies.triggers import DivergenceTrigger, EntropyTrigger, RandomTrigger
from s2t_models.recipe import Recipe
from s2t_models.router import Router, RouterConfig, save_router
from s2t_models.settings import MultiplexSettings, SamplerSettings, TahSettings

THRESHOLDS = {
    "kl": {0.01: 3.0, 0.05: 2.0, 0.1: 1.0},
    "entropy": {0.01: 1.5},
    "head": {0.01: 4.0, 0.20: -1.0},
}
MODEL = {"path": "embedded:slm"}
RECIPE = Recipe.model_validate({"name": "pair", "slm": MODEL, "teacher": MODEL, "checkpoints": {"distilled": "x"}})


def hosting(
    recipe: Recipe = RECIPE, thresholds=THRESHOLDS, router: Path | None = None, second: Path | None = None, **changes
) -> Hosting:
    recipe = recipe.model_copy(update=changes)
    slm = Hosted("slm", recipe.slm, router=router, second_pass=second)
    engines = {
        "slm": slm,
        "teacher": Hosted("teacher", recipe.teacher),
        "s2t-local": Hosted("s2t-local", recipe.slm, artifact=Path("artifact")),
        **{name: Hosted(name, recipe.slm) for name in ("kd", "distil", "tsd-kd", "distilled")},
    }
    return Hosting(recipe, "digest", slm, engines, thresholds)


def get(name: str, **changes):
    return policy(name, hosting(**changes))


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("router")
    save_router(Router(RouterConfig(hidden=8, width=8, blocks=1, threshold=0.25)), folder)
    return folder


def test_every_policy_is_offered_under_its_name(router):
    offered, refused = offer(hosting(router=router, second=Path("second")))
    assert list(offered) == names(hosting())
    assert refused == {}
    assert all(built.name == name for name, built in offered.items())
    assert set(offered) == {
        *("greedy", "sample", "maj@8", "llm", "llm-sample", "takeover", "s2t", "s2t-dynamic-01", "s2t-dynamic-05"),
        *("takeover-entropy", "s2t-entropy", "takeover-random", "s2t-random", "s2t-local", "s2t-local-w0", "r2r"),
        *("s2t-local-kl", "s2t-local-entropy", "s2t-local-random", "specreason", "multiplex", "kd", "distil"),
        *("tsd-kd", "distilled", "tah"),
    }
    assert {name for built in offered.values() for name in built.needs} == {
        *("slm", "teacher", "s2t-local", "kd", "distil", "tsd-kd", "distilled"),
    }


def test_penalties_are_for_policies_that_decode_plainly():
    taking = {name for name, built in offer(hosting())[0].items() if built.takes_penalties}
    assert taking == {
        "greedy",
        "sample",
        "maj@8",
        "llm",
        "llm-sample",
        "specreason",
        "kd",
        "distil",
        "tsd-kd",
        "distilled",
    }


def test_what_cannot_be_served_is_not_offered_and_says_why():
    bare = hosting(thresholds={})
    offered, refused = offer(bare.only(["slm", "teacher"]))
    assert {"s2t-random", "greedy", "maj@8", "multiplex"} <= set(offered)
    assert not set(offered) & set(refused)
    assert set(offered) | set(refused) == set(names(bare))
    assert "no kl threshold for budget 0.01" in refused["s2t"]
    assert "no head threshold" in refused["s2t-local"]
    assert "router.path is not set" in refused["r2r"]
    assert refused["kd"] == "kd needs the engine kd, which is not served here"
    assert "needs the engine s2t-local" in refused["s2t-local-random"]


def test_a_capability_that_an_engine_lacks_is_named(monkeypatch):
    from s2t_models.engines import load

    plain = load.EngineKind("nowhere", plain=frozenset({"entropy"}))
    monkeypatch.setitem(load.ENGINES, "plain", plain)
    slm = RECIPE.slm.model_copy(update={"engine": "plain"})
    offered, refused = offer(hosting(slm=slm, second=Path("second")))
    assert refused["tah"] == "tah needs second_pass of slm, which a plain engine does not have here"
    assert refused["multiplex"] == "multiplex needs multiplex of slm, which a plain engine does not have here"
    assert {"greedy", "s2t", "s2t-entropy", "s2t-local"} <= set(offered)


def test_settings_come_from_the_recipe_with_the_published_defaults():
    own = SamplerSettings(temperature=0.7, top_p=0.8, top_k=20)
    assert get("sample") == SingleModel("sample", "slm", own)
    assert get("llm-sample") == SingleModel("llm-sample", "teacher", SamplerSettings(temperature=0.6, top_p=0.95))
    assert get("distilled") == SingleModel("distilled", "distilled")
    assert get("maj@3") == Majority("maj@3", own, 3)
    expected = MultiplexSettings(width=3, temperature=1.0, weighted=True, entropy=0.1, patience=256)
    assert get("multiplex") == MultiplexThinking("multiplex", expected, own)
    assert get("tah", second=Path("second")) == ThinkAtHard(
        "tah", TahSettings(threshold=0.9, sampler=SamplerSettings(temperature=0.6, top_p=0.95, top_k=20))
    )
    specreason = get("specreason").settings
    assert (specreason.accept, specreason.step_tokens, specreason.delimiter) == (7, 512, "\n\n")


def test_names_carry_metric_budget_and_candidates():
    teacher = TeacherScorer("candidate")
    assert get("s2t") == Collaborate("s2t", DivergenceTrigger(3.0), teacher, RECIPE.candidates, 64, 16, 0, budget=0.01)
    assert get("takeover@0.10").trigger == DivergenceTrigger(1.0)
    assert get("takeover@0.10").scorer == TeacherScorer("vocabulary")
    assert get("s2t-entropy").trigger == EntropyTrigger(1.5)
    assert get("takeover-random@0.07").trigger == RandomTrigger(0.07)
    four = get("s2t-k4@0.05")
    assert (four.candidates.k, four.trigger) == (4, DivergenceTrigger(2.0))
    dynamic = get("s2t-dynamic-05").candidates
    assert (dynamic.ratio, dynamic.method, dynamic.k) == (0.05, "top_k", 64)
    for name in ("s2t-t0.6-p0.95-k4", "s2t-local-t0.6-p0.95-k4@0.01"):
        built = get(name, candidates=RECIPE.candidates.model_copy(update={"method": "top_k"}))
        drawn = built.selection.candidates if isinstance(built, Local) else built.candidates
        assert (drawn.temperature, drawn.top_p, drawn.k, drawn.method) == (0.6, 0.95, 4, "multinomial")
        assert built.kind == name.partition("-k4")[0]


@pytest.mark.parametrize(
    ("name", "kind", "k", "budget", "votes"),
    [
        ("s2t-k4@0.05", "s2t", 4, 0.05, None),
        ("s2t-entropy", "s2t-entropy", 8, 0.01, None),
        ("takeover@0.05", "takeover", None, 0.05, None),
        ("s2t-local-w0@0.2", "s2t-local-w0", 8, 0.2, None),
        ("s2t-local-kl-k2", "s2t-local-kl", 2, 0.01, None),
        ("maj@5", "maj@5", None, None, 5),
        ("greedy", "greedy", None, None, None),
    ],
)
def test_a_policy_says_its_kind_k_budget_and_votes(name, kind, k, budget, votes):
    built = get(name)
    assert (built.kind, built.k, built.budget, built.votes) == (kind, k, budget, votes)


def test_local_takes_the_prior_weight_from_the_recipe_or_the_name():
    weighted = RECIPE.policies.model_copy(
        update={"local": RECIPE.policies.local.model_copy(update={"prior_weight": 2.0})}
    )
    expected = Selection(4.0, RECIPE.candidates, 2.0, 0.1, 0)
    assert get("s2t-local", policies=weighted) == Local("s2t-local", expected, 0.01)
    assert get("s2t-local-w0", policies=weighted).selection.prior_weight == 0
    other = get("s2t-local-k4-w0.5@0.2").selection
    assert (other.candidates.k, other.prior_weight, other.threshold) == (4, 0.5, -1.0)


def test_local_behind_another_trigger_selects_by_the_artifact():
    oracle = get("s2t-local-kl-w1@0.05")
    assert (oracle.trigger, oracle.drafter) == (DivergenceTrigger(2.0), "s2t-local")
    assert oracle.scorer == SelectorScorer(Selection(0.0, RECIPE.candidates, 1.0, 0.1))
    assert oracle.needs == {"s2t-local": frozenset({"select"}), "teacher": frozenset()}
    assert get("s2t-local-entropy").needs == {"s2t-local": frozenset({"entropy", "select"})}


def test_an_artifact_of_that_name_selects_by_its_own_settings():
    weighted = RECIPE.policies.model_copy(
        update={"local": RECIPE.policies.local.model_copy(update={"prior_weight": 2.0})}
    )
    recipe = RECIPE.model_copy(update={"artifacts": {"new-k2": "there", "gone": "there"}})
    other = NamedArtifact(recipe.model_copy(update={"policies": weighted}), {"head": {0.01: 7.0, 0.05: 6.0}})
    both = replace(hosting(recipe), artifacts={"new-k2": other, "gone": other})
    engine = both.engines["s2t-local"]
    both = replace(both, engines={**both.engines, "s2t-local:new-k2": replace(engine, name="s2t-local:new-k2")})
    built = policy("s2t-local:new-k2", both)
    assert built == Local("s2t-local:new-k2", Selection(7.0, RECIPE.candidates, 2.0, 0.1, 0), 0.01, "s2t-local:new-k2")
    assert policy("s2t-local", both) == get("s2t-local")
    varied = policy("s2t-local-k4-w0@0.05:new-k2", both)
    assert (varied.selection.threshold, varied.selection.prior_weight, varied.k, varied.budget) == (6.0, 0, 4, 0.05)
    assert varied.kind == "s2t-local-w0:new-k2"
    assert varied.needs == {"s2t-local:new-k2": frozenset({"select"})}
    chance = policy("s2t-local-random@0.3:new-k2", both)
    assert (chance.trigger, chance.drafter) == (RandomTrigger(0.3), "s2t-local:new-k2")
    assert chance.needs == {"s2t-local:new-k2": frozenset({"select"})}
    offered, refused = offer(both)
    assert set(offered) | set(refused) == set(names(both))
    assert {"s2t-local:new-k2", "s2t-local-w0:new-k2", "s2t-local-random:new-k2"} <= set(offered)
    assert "no kl threshold" in refused["s2t-local-kl:new-k2"]
    assert refused["s2t-local:gone"] == "s2t-local:gone needs the engine s2t-local:gone, which is not served here"
    for name in ("s2t:new-k2", "takeover:new-k2", "greedy:new-k2", "s2t-local:", "s2t-local-dynamic-05:new-k2"):
        with pytest.raises(PolicyError, match="no policy named"):
            policy(name, both)
    with pytest.raises(PolicyError, match=r"no artifact 'gone@0.05'; there are new-k2, gone, as in s2t-local@0.05:new"):
        policy("s2t-local:gone@0.05", both)


def test_a_fixed_head_threshold_is_a_probability_and_has_no_budget():
    fixed = RECIPE.trigger.model_copy(update={"head_threshold": 0.9})
    built = policy("s2t-local", hosting(thresholds={}, trigger=fixed))
    assert built.selection.threshold == pytest.approx(2.1972, abs=1e-4)
    assert built.budget is None
    assert get("s2t-local@0.2", trigger=fixed).selection.threshold == -1.0


def test_the_published_variant_is_settings_alone():
    published = Recipe.model_validate({"name": "pair", "slm": MODEL, "teacher": MODEL, "published": True})
    built = policy("s2t@0.05", hosting(published))
    trigger = DivergenceTrigger(2.0, "renormalised")
    assert built == Collaborate(
        "s2t@0.05", trigger, TeacherScorer("candidate"), published.candidates, 64, 16, warmup=3, budget=0.05
    )
    assert published.candidates.method == "top_k"


def test_a_threshold_in_the_recipe_needs_no_calibration():
    fixed = RECIPE.trigger.model_copy(update={"threshold": 0.7})
    assert policy("s2t", hosting(thresholds={}, trigger=fixed)).trigger == DivergenceTrigger(0.7)


def test_r2r_is_takeover_by_a_router(router):
    built = policy("r2r", hosting(thresholds={}, router=router))
    assert isinstance(built, Collaborate)
    assert (built.trigger, built.scorer) == (RouterTrigger(0.25), TeacherScorer("vocabulary"))
    assert built.needs["slm"] == frozenset({"route"})
    second = hosting(thresholds={}, routers={"second": "there"})
    own = replace(second.slm, name="slm:second", router=router)
    named = policy("r2r:second", replace(second, engines={**second.engines, "slm:second": own}))
    assert (named.trigger, named.drafter) == (RouterTrigger(0.25, "slm:second"), "slm:second")
    assert named.needs == {"slm:second": frozenset({"route"}), "teacher": frozenset()}
    for name, words in (("r2r:second", "slm:second, which is not served"), ("r2r:third", "the recipe's routers: sec")):
        with pytest.raises(PolicyError, match=words):
            policy(name, second)
    without = replace(hosting(router=router), engines={"slm": Hosted("slm", RECIPE.slm), "teacher": None})
    assert lacking(built, without) == "r2r needs route of slm, which a torch engine does not have here"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("s2t-lokal", "no policy named 's2t-lokal'; there are: greedy, sample, llm"),
        ("maj@0", "no policy named 'maj@0'"),
        ("maj@129", "maj@129: at most 128 samples vote"),
        ("takeover-k4", "no policy named 'takeover-k4'"),
        ("s2t-w0", "no policy named 's2t-w0'"),
        ("s2t-local-dynamic-05", "no policy named"),
        ("s2t@0.2", "s2t@0.2: no kl threshold for budget 0.2; calibrated budgets: 0.01, 0.05, 0.1"),
        ("s2t-local@0.05", "no head threshold for budget 0.05; calibrated budgets: 0.01, 0.2"),
        ("s2t-random@2", "s2t-random@2: a budget is a share of the steps above 0 and up to 1"),
        ("s2t-k65", "s2t-k65: a step has at most 64 candidates"),
        ("s2t-t0", "s2t-t0: candidates are drawn at a temperature above 0"),
        ("takeover-p0.9", "no policy named 'takeover-p0.9'"),
        ("r2r", "r2r: router.path is not set; `s2t distil --objective router` trains one"),
        ("tah", "tah: the recipe names no second pass as tah; `s2t distil --objective tah` trains one"),
    ],
)
def test_refusals_are_one_line(name, message):
    with pytest.raises(PolicyError) as refused:
        get(name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
