"""The recipe: what it takes, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.tasks import load
from s2t_models.recipe import RecipeError, load_recipe, shipped_recipes


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
        ("artifacts.a:b=there", "artifacts.a:b: a name has letters, digits, dashes and underscores"),
        ("artifacts={-x: there}", "artifacts.-x: a name"),
        ("routers.a/b=there", "routers.a/b: a name"),
        ("checkpoints.s2t-local:new=there", "checkpoints.s2t-local:new: a name"),
        ("artifacts.new=", "artifacts.new = null"),
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
    broken.write_text("name: x\nartifacts: {new: a, other: b, new: c}")
    with pytest.raises(RecipeError, match="new is there twice"):
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


PAPER = sorted(name for name in shipped_recipes() if name.startswith("paper/"))
ORIGINS = ("paper", "published code", "ours: ")


def test_there_is_a_recipe_for_each_pair_of_the_paper():
    pairs = {Path(load_recipe(name).slm.path).name for name in PAPER}
    assert len(PAPER) == len(pairs) == 5


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_recipe_says_how_it_is_run_and_where_each_setting_is_from(name: str):
    recipe, lines = load_recipe(name), shipped_recipes()[name].read_text().splitlines()
    assert recipe.name == name.removeprefix("paper/")
    assert lines[0].endswith(f":  s2t loop --recipe {name} --output runs/{recipe.name}")
    settings = [line for line in lines if line.strip() and not line.startswith("#") and not line.endswith(":")]
    unmarked = [line for line in settings[1:] if not line.partition("  # ")[2].startswith(ORIGINS)]
    assert not unmarked
    # Prompt and answer fit the context: the longest answers are 4,096 tokens, and prompts take a few hundred.
    room = recipe.benchmark.max_new_tokens or 4096
    assert recipe.slm.context == recipe.teacher.context >= room + 512
    assert recipe.benchmark.seeds == (0, 1, 2)
    assert recipe.reserved.count == (12 if "0.5b" in name else 16)


def test_maths_is_asked_in_the_words_of_the_published_code_where_a_recipe_says_so(data_dir: Path):
    own, published = (load("math500", data_dir, prompts)[1][0] for prompts in ("own", "published"))
    assert own.prompt[1] == published.prompt[1] == {"role": "user", "content": own.question}
    assert own.prompt[0]["content"] != published.prompt[0]["content"]
    assert published.prompt[0]["content"].endswith("put the final answer in the format \\boxed{answer}.")
    choice = load("arc_challenge", data_dir, "published")[1][0]
    assert "\nA. " in choice.prompt[1]["content"]
    assert "'The answer is (X)'" in choice.prompt[1]["content"]
    assert load("mt_bench", data_dir, "published")[1] == load("mt_bench", data_dir)[1]
