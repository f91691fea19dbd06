"""The ablations of the selector and the baseline `distil`: what they train, on whose texts, what that asked of the
teacher, and where a benchmark shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from labelled_rows import labelled_rows
from made_up import provenance
from test_distil import write
from test_golden_losses import rows_to_learn, small_recipe

from pipelines.benchmark.training import teacher_tokens
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.prompts import Prompt, rows
from pipelines.collect.schemas import PROMPT
from pipelines.data.schema import SHARD
from pipelines.data.shards import ShardError
from pipelines.distil.inputs import check_inputs
from pipelines.results.summary import TRAINING, markdown, summarise
from s2t_models.hosting import pair
from s2t_models.loading import load_model
from s2t_models.provenance import TeacherTokens
from s2t_models.recipe import RecipeError, load_recipe
from s2t_models.reserved import reserved_rows
from s2t_models.training.batches import trajectories
from s2t_models.training.objectives import objective
from s2t_models.training.selector import ROWS
from s2t_models.training.trainer import Trainer


@pytest.fixture(scope="module")
def learnable() -> list[dict[str, Any]]:
    return rows_to_learn()[:6]


@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("head-only", "selection_loss"),
        ("pointwise", "pointwise_loss"),
        ("listmle", "listmle_loss"),
        ("soft-labels", "soft_loss"),
        ("distil", "ce_loss"),
    ],
)
def test_a_few_steps_lower_the_loss(learnable: list[dict[str, Any]], name: str, term: str):
    recipe = small_recipe()
    two_stage = recipe.distil.two_stage.model_copy(update={"learning_rate": 2e-3, "supervised": 1.0})
    rate = 0.02 if name == "head-only" else 2e-3
    changes = {"batch": 4, "steps": 6, "learning_rate": rate, "two_stage": two_stage}
    recipe = recipe.model_copy(update={"distil": recipe.distil.model_copy(update=changes)})
    trainer = Trainer(recipe, name, trajectories(learnable))
    found = [trainer.advance()[term] for _ in range(5)]
    assert found[-1] < 0.9 * found[0]
    only_rows = list(trainer.selector.trained()) == [ROWS]
    assert only_rows == (name == "head-only")
    assert (ROWS in trainer.selector.trained()) == (name != "distil")
    assert (trainer.evaluate()["kl_to_base"] == pytest.approx(0, abs=1e-8)) == (name == "head-only")


def test_distil_takes_up_the_teachers_best_tokens_in_its_second_half(learnable: list[dict[str, Any]]):
    recipe = small_recipe()
    two_stage = recipe.distil.two_stage.model_copy(update={"supervised": 0.5})
    changes = {"batch": 4, "steps": 4, "two_stage": two_stage}
    recipe = recipe.model_copy(update={"distil": recipe.distil.model_copy(update=changes)})
    trainer = Trainer(recipe, "distil", trajectories(learnable))
    assert ["forward_kl_loss" in trainer.advance() for _ in range(4)] == [False, False, True, True]


def test_the_baselines_train_at_rates_of_their_own(recipe_path: Path, learnable: list[dict[str, Any]]):
    recipe = load_recipe(recipe_path, ["distil.steps=10", "distil.learning_rate=0.5", "distil.warmup=0.7"])
    chosen = {name: objective(name, recipe.distil) for name in ("distil", "tsd-kd", "listmle")}
    rates = {name: (one.learning_rate, one.warmup) for name, one in chosen.items()}
    assert rates == {"distil": (2e-3, 0.1), "tsd-kd": (5e-4, 0.1), "listmle": (0.5, 0.7)}
    trainer = Trainer(recipe, "distil", trajectories(learnable))
    trainer.step = 1  # after a warm-up of a tenth
    assert trainer._learning_rate() == pytest.approx(2e-3)


def test_the_teacher_writes_and_its_best_tokens_are_kept_of_every_step(recipe_path: Path):
    recipe = load_recipe(recipe_path, ["collect.max_new_tokens=16", "collect.sampled=0"]).by_teacher()
    assert (recipe.collect.k, recipe.collect.steps, recipe.collect.random_steps) == (10, 1.0, 0.0)
    asked = rows(
        [Prompt(f"p/{n}", [{"role": "user", "content": f"Mia has {n} pens. How many?"}]) for n in (3, 14)], recipe
    )
    engines = pair(recipe)
    writer, reader = Rollouts(recipe, engines["teacher"]), Labels(recipe, engines["slm"])
    found = reader(writer(pa.Table.from_pylist(asked, PROMPT))).to_pylist()
    writer.engine.close()
    reader.engine.close()
    models, never = (
        {name: load_model(getattr(recipe, name)) for name in ("slm", "teacher")},
        list(reserved_rows(recipe)),
    )
    for row in found:
        start, ids = len(row["prompt_ids"]), row["prompt_ids"] + row["output_ids"]
        assert row["teacher_read"] == start
        logprobs = {}
        for name, model in models.items():
            with torch.no_grad():
                logits_TV = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            logits_TV[:, never] = -torch.inf
            logprobs[name] = logits_TV.log_softmax(-1).numpy()
        assert row["output_ids"] == logprobs["teacher"].argmax(-1).tolist() == row["teacher_argmax_T"]
        p, q = np.exp(logprobs["teacher"]), logprobs["slm"]
        exact_T = np.where(p > 0, p * np.maximum(logprobs["teacher"], -1e4) - p * np.maximum(q, -1e4), 0).sum(-1)
        np.testing.assert_allclose(row["kl_T"], exact_T, atol=2e-2)
        for t, step in enumerate(row["kept"]):
            best_K = np.argsort(-logprobs["teacher"][t], kind="stable")[:10]
            assert step["candidates_K"][:3] == best_K[:3].tolist()
            assert len(step["candidates_K"]) == 10
            for name in models:
                expected_K = logprobs[name][t, step["candidates_K"]]
                np.testing.assert_allclose(step[f"{name}_logprobs_K"], expected_K, atol=2e-3)
            rank = int((q[t] > q[t, row["teacher_argmax_T"][t]]).sum())
            assert row["teacher_rank_T"][t] == rank


def test_the_teachers_tokens_come_from_those_the_support_has(recipe_path: Path):
    with pytest.raises(RecipeError, match=r"distil\.two_stage\.top = 20: the teacher's tokens come from the 16"):
        load_recipe(recipe_path, ["distil.two_stage.top=20", "divergence.support=16"])


def test_collections_are_metered_and_a_training_takes_those_of_its_writer(recipe_path: Path, tmp_path: Path):
    recipe = load_recipe(recipe_path)
    made = labelled_rows(recipe, "embedded-train", 4)
    table = pa.Table.from_pylist(made, SHARD)
    prompts, outputs = (sum(len(row[name]) for row in made) for name in ("prompt_ids", "output_ids"))
    read = write(tmp_path / "read", table, recipe, "embedded-train")
    answers = pa.Table.from_pylist([row | {"teacher_read": len(row["prompt_ids"])} for row in made], SHARD)
    written = write(tmp_path / "written", answers, recipe.by_teacher(), "embedded-train")
    other = pa.Table.from_pylist(labelled_rows(recipe, "embedded-calibration", 2), SHARD)
    calibration = write(tmp_path / "calibration", other, recipe, "embedded-calibration")

    whole = check_inputs(recipe, "selector", read, calibration, {}, {})
    lengths = other["prompt_ids"].combine_chunks(), other["output_ids"].combine_chunks()
    assert whole.teacher == TeacherTokens(read=prompts + outputs + sum(len(of.flatten()) for of in lengths))
    by_teacher = check_inputs(recipe, "distil", written, None, {}, {}, "teacher")
    assert by_teacher.teacher == TeacherTokens(read=prompts, written=outputs)
    assert by_teacher.divergence == "KL(teacher || SLM), top 64, bucket"
    with pytest.raises(
        ShardError, match=r"by S2T, and the training of distil takes those of the teacher; .* s2t collect --teacher$"
    ):
        check_inputs(recipe, "distil", read, None, {}, {}, "teacher")
    with pytest.raises(
        ShardError, match=r"by the teacher, and the training of kd takes those of the SLM or S2T; .* s2t collect$"
    ):
        check_inputs(recipe, "kd", written, None, {}, {})


def test_the_table_shows_what_training_asked_of_the_teacher(recipe_path: Path, tmp_path: Path):
    def trained(name: str, read: int, written: int) -> str:
        (tmp_path / name).mkdir()
        provenance(teacher=TeacherTokens(read=read, written=written)).write(tmp_path / name)
        return str(tmp_path / name)

    provenance().write(tmp_path)  # a record from before it was metered
    folders = {"tsd-kd": trained("tsd-kd", 1200, 0), "distil": trained("distil", 300, 450), "kd": str(tmp_path)}
    settings = [*(f"checkpoints.{name}={folder}" for name, folder in folders.items())]
    settings += [f"routers.mine={trained('router', 7, 8)}", f"tah={trained('tah', 40, 2)}"]
    recipe = load_recipe(recipe_path, settings)
    needs: dict[str, list[str]] = {"greedy": ["slm"], **{name: [name] for name in folders}, "llm": ["teacher"]}
    said = {name: {"needs": engines} for name, engines in needs.items()}
    said["r2r:mine@0.1"] = {"needs": ["slm:mine", "teacher"], "kind": "r2r:mine"}
    said["tah"] = {"needs": ["slm"], "kind": "tah"}
    asked = teacher_tokens(recipe, said)
    assert {name: (tokens.read, tokens.written) for name, tokens in asked.items()} == {
        "tsd-kd": (1200, 0),
        "distil": (300, 450),
        "r2r:mine@0.1": (7, 8),
        "tah": (40, 2),
    }
    answer = {"task": "t", "item": "1", "seed": 0, "repeat": 0, "k": None, "budget": None, "error": None, "tokens": 3}
    answer |= {"verdict": "correct", "score": 1.0, "usage": "{}", "decisions": "[]", "seconds": 0.1, "shortened": False}
    frame = pd.DataFrame([answer | {"policy": name, "kind": name} for name in said])
    metadata = {TRAINING: json.dumps({name: tokens.model_dump() for name, tokens in asked.items()})}
    summaries = summarise(frame, metadata)
    header, _, *lines = (line.split("|") for line in markdown(summaries, []).splitlines()[2:])
    places = [[cell.strip() for cell in header].index(column) for column in ("training read", "training wrote")]
    shown = [tuple(line[place].strip() for place in places) for line in lines]
    assert shown == [("", ""), ("1,200", "0"), ("300", "450"), ("", ""), ("", ""), ("7", "8"), ("40", "2")]
