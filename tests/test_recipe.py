"""The recipe: what it takes, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from s2t_models.recipe import RecipeError, load_recipe


def test_overrides_are_typed_and_nested(recipe_path):
    recipe = load_recipe(recipe_path, ["budget=0.05", "collect.rollout.actors=3", "slm.revision=abc"])
    assert (recipe.budget, recipe.collect.rollout.actors, recipe.slm.revision) == (0.05, 3, "abc")
    assert recipe.collect.k == load_recipe(recipe_path).collect.k
    assert recipe.digest() != load_recipe(recipe_path).digest()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("budgett=0.1", "unknown key budgett"),
        ("slm.slots=many", "slm.slots"),
        ("budget=2", "budget"),
        ("candidates.method=best", "candidates.method"),
        ("budget", "expected a.b=value"),
        ("budget.x=1", "budget is not a section"),
        ("published=1", "published = 1: input should be a valid boolean"),
        ("published='true'", "published"),
        ("seed=-1", "seed = -1"),
        ("distil.validation=1.0", "distil.validation"),
        ("candidates.k=65", "candidates.k = 65"),
        ("divergence.support=4", "candidates.k = 8: candidates come from the 4 tokens of divergence.support"),
        ("checkpoints.slm=there", "checkpoints.slm: that is the name of an engine"),
        ("benchmark.policies=[]", "benchmark.policies"),
    ],
)
def test_wrong_settings_are_refused_by_name_in_one_line(recipe_path, override, named):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_path, [override])
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_published_choices_beside_a_section_that_is_none(recipe_path):
    with pytest.raises(RecipeError, match="divergence = 3"):
        load_recipe(recipe_path, ["divergence=3", "published=true"])


def test_a_shipped_recipe_goes_by_its_name_unless_a_file_is_called_the_same(recipe_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("embedded") == load_recipe(Path("embedded")) == load_recipe(recipe_path)
    (tmp_path / "embedded").write_text("name: mine")
    with pytest.raises(RecipeError, match="embedded: missing key slm"):
        load_recipe("embedded")


def test_missing_and_broken_files_are_named(tmp_path):
    for path in (tmp_path / "none.yaml", "embeded"):
        with pytest.raises(RecipeError, match=f"{path}: no such recipe file; recipes that ship, by name: embedded"):
            load_recipe(path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(broken)
    broken.write_text("name: x")
    with pytest.raises(RecipeError, match="missing key slm; missing key teacher"):
        load_recipe(broken)


def test_the_published_variant_takes_the_published_choices(recipe_path):
    recipe = load_recipe(recipe_path, ["published=true"])
    assert recipe.divergence.tail == "renormalised"
    assert recipe.trigger.warmup == 3
    assert recipe.candidates.method == "top_k"
    assert recipe.candidates.k == 8
