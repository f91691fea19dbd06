"""Collections that S2T writes: Algorithm 1 step by step, labels from the readings that chose, and what they cost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from label_reference import assert_labels_equal_brute_force

from pipelines.collect.__main__ import main
from pipelines.collect.job import collect
from pipelines.collect.prompts import from_task, rows
from pipelines.collect.rescued import RescuedRollouts, rescuing
from pipelines.collect.schemas import PROMPT
from pipelines.data.shards import ShardError, read_shards
from pipelines.distil.inputs import check_inputs
from s2t_models import loading
from s2t_models.engines.contract import ContextOverflow, Sampling
from s2t_models.engines.load import load
from s2t_models.engines.metering import Metered
from s2t_models.hosting import collecting
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.reserved import reserved_rows
from s2t_models.settings import ActorPool
from serving.engine_actor import engine_actors

THRESHOLD = 0.1
SETTINGS = [
    "collect.writer=s2t",
    "collect.prompts=24",
    "collect.max_new_tokens=60",
    "collect.rollout.batch=8",
    "collect.rollout.num_cpus=0.5",
    "collect.label.num_cpus=0.5",
    "collect.label.actors=2",
    f"trigger.threshold={THRESHOLD}",
]


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def collection(ray_cluster: None, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rescued")
    collect(recipe, output)
    return output


@pytest.fixture(scope="module")
def written(collection: Path) -> list[dict[str, Any]]:
    return read_shards(collection)[0].to_pylist()


def test_the_labels_are_those_of_a_forward_over_the_whole_text(written: list[dict[str, Any]], recipe: Recipe) -> None:
    assert not [row["error"] for row in written if row["error"]]
    assert_labels_equal_brute_force([row for row in written if row["kept"]][:8], recipe)


@torch.no_grad()
def test_where_the_models_diverge_the_teachers_choice_among_the_candidates_stands(
    written: list[dict[str, Any]], recipe: Recipe
) -> None:
    """The greedy texts against full forwards of both models."""
    slm, teacher = (loading.load_model(settings).double() for settings in (recipe.slm, recipe.teacher))
    masked, rescued = list(reserved_rows(recipe)), 0
    for row in [row for row in written if row["temperature"] == 0][:8]:
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        p_TV, q_TV = (model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1] for model in (slm, teacher))
        p_TV[:, masked] = -torch.inf
        top_TK = p_TV.topk(recipe.candidates.k).indices
        best_T = top_TK.gather(-1, q_TV.gather(-1, top_TK).argmax(-1, keepdim=True)).squeeze(-1)
        critical_T = torch.tensor(row["kl_T"]) >= THRESHOLD
        assert row["output_ids"] == torch.where(critical_T, best_T, top_TK[:, 0]).tolist()
        rescued += int((best_T != top_TK[:, 0])[critical_T].sum())
    assert rescued > 5


def test_texts_are_those_of_step_by_step_decoding_at_little_more_than_a_reading_of_each_token(
    written: list[dict[str, Any]], collection: Path, recipe: Recipe
) -> None:
    """One token a draft, on engines in this process: the teacher reads each token but the last once."""
    hosting = collecting(recipe.changed({"collect.chunk": 1}))
    teacher = load(hosting.engines["teacher"])
    rollouts = RescuedRollouts(hosting.recipe, hosting.engines["slm"], rescuing(hosting), [teacher])
    prompts = rows(from_task(recipe.collect.task, None, recipe), recipe)
    try:
        stepwise = rollouts(pa.Table.from_pylist(prompts, PROMPT)).to_pylist()
    finally:
        rollouts.engine.close()
        teacher.close()
    once = [len(row["prompt_ids"] + row["output_ids"]) - 1 for row in stepwise]
    assert [row["output_ids"] for row in stepwise] == [row["output_ids"] for row in written]
    assert [row["teacher_read"] for row in stepwise] == once
    read = [row["teacher_read"] for row in written]
    assert all(more >= least for more, least in zip(read, once, strict=True))
    assert sum(once) < sum(read) < 1.2 * sum(once), "drafts that were cut are counted"
    summary = json.loads((collection / "collect.json").read_text())
    assert (summary["teacher_prefill"], summary["teacher_decode"]) == (sum(read), 0)


def test_what_the_teacher_read_is_what_its_engine_counts(recipe: Recipe) -> None:
    """Also where a draft that was cut is drafted again."""
    hosting = collecting(recipe.changed({"collect.chunk": 8, "collect.prompts": 8}))
    teacher = load(hosting.engines["teacher"])
    metered = Metered(teacher)
    rollouts = RescuedRollouts(hosting.recipe, hosting.engines["slm"], rescuing(hosting), [metered])
    prompts = rows(from_task(recipe.collect.task, None, hosting.recipe), hosting.recipe)
    try:
        made = rollouts(pa.Table.from_pylist(prompts, PROMPT)).to_pylist()
    finally:
        rollouts.engine.close()
        teacher.close()
    assert sum(row["teacher_read"] for row in made) == metered.usage.prefill
    assert metered.usage.prefill > sum(len(row["prompt_ids"] + row["output_ids"]) for row in made)


def test_a_selector_is_trained_on_them_and_calibrated_on_the_slms_own(collection: Path, recipe: Recipe) -> None:
    provenance = check_inputs(recipe, "selector", collection, None, {}, {})
    assert provenance.teacher is not None
    assert provenance.teacher.read == json.loads((collection / "collect.json").read_text())["teacher_prefill"]
    said = r"by S2T, and the calibration of selector takes those of the SLM; .* s2t collect --calibration$"
    with pytest.raises(ShardError, match=said):
        check_inputs(recipe, "selector", collection, collection, {}, {})
    with pytest.raises(ShardError, match=r"by S2T, and the training of distil takes those of the teacher; "):
        check_inputs(recipe, "distil", collection, None, {}, {}, "teacher")


def test_without_a_threshold_it_says_what_to_collect_first(
    recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", str(recipe_path), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("collect: collect.writer s2t: no kl threshold for budget 0.1; ")
    assert "set trigger.calibration to what `s2t collect --calibration` wrote" in said
    assert said.count("\n") == 1


def test_other_rescues_into_the_same_folder_are_refused(
    collection: Path, recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SETTINGS, "trigger.threshold=0.2", "candidates.k=4"]
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert main(["--recipe", str(recipe_path), "--output", str(collection), *overrides]) == 2
    assert "other settings (candidates.k, trigger.threshold)" in capsys.readouterr().err


def test_an_engine_that_ends_with_its_actor_is_started_again_and_answers_the_call(
    ray_cluster: None, recipe: Recipe
) -> None:
    from ray.util.state import list_actors

    hosted = collecting(recipe).engines["teacher"]
    tokens, ids_TN = list(range(40, 60)), np.arange(50, 58)[None].repeat(5, 0)

    async def asked() -> None:
        with engine_actors(hosted, ActorPool(num_cpus=0.5)) as (engine,):
            before = await engine.score(tokens, 16, ids_TN)
            (actor,) = list_actors(filters=[("class_name", "=", "EngineActor"), ("state", "=", "ALIVE")])
            os.kill(actor.pid, signal.SIGKILL)
            after = await engine.score(tokens, 16, ids_TN)
            np.testing.assert_array_equal(after.logprobs_TN, before.logprobs_TN)
            draft = await engine.generate(tokens, Sampling(max_tokens=4))
            assert len(draft.ids) == 4
            with pytest.raises(ContextOverflow):
                await engine.score([50] * 100_000, 16, ids_TN)

    asyncio.run(asked())
