"""Every family of the paper through the loop, on tiny random pairs: collect, distil, decode, audit.

Each stage is held to transformers' own forward: rollouts and labels to the models' log-probabilities, S2T-Local's text
to a step-by-step decoder, the audit to the teacher's probabilities.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from made_up import provenance
from tiny_families import FAMILIES, write_pair

from pipelines.analyse.audit import judge
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.prompts import Prompt, rows
from pipelines.collect.publish import publish
from pipelines.collect.schemas import PROMPT
from pipelines.data.seal import sealed
from pipelines.data.shards import shard_metadata
from pipelines.data.trajectories import ShardTrajectories
from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.engines.contract import Draft, Sampling, Selection
from s2t_models.engines.load import load
from s2t_models.hosting import Hosted, pair
from s2t_models.recipe import Recipe
from s2t_models.reserved import bins, reserved_rows
from s2t_models.settings import CandidateSettings
from s2t_models.training.build import build
from s2t_models.training.trainer import Trainer

R, K, TOKENS = 16, 4, 24
#: The teacher has this many rows that the SLM has not (Qwen2.5: 152,064 against 151,936).
MORE_ROWS = 9

#: From a text's ids to transformers' own next-token log-probabilities [V], reserved rows and rows beyond the SLM's
#: left out.
LogProbabilities = Callable[[list[int]], torch.Tensor]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_goes_through_the_loop(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    models = write_pair(family, tmp_path, teacher_rows=MORE_ROWS)
    recipe = _recipe(tmp_path)
    reserved = reserved_rows(recipe)
    assert len(reserved) == (R if family.free >= R else 0)
    tokenizer = loading.load_tokenizer(recipe.slm)
    held = tokenizer.convert_ids_to_tokens([row for row in reserved if row < len(tokenizer)])
    assert all("reserved" in token or "unused" in token or "placeholder" in token for token in held)
    slm, teacher = (_log_probabilities(models[side], reserved, models["slm"].config.vocab_size) for side in models)

    collection = _collect(recipe, tmp_path, slm, teacher)
    folder = tmp_path / "artifact"
    _distil(recipe, collection, folder)
    _decode_and_audit(recipe, folder, teacher)


def _recipe(folder: Path) -> Recipe:
    models = {
        side: {"path": str(folder / side), "dtype": "float32", "device": "cpu", "slots": 4, "context": 200}
        for side in ("slm", "teacher")
    }
    return Recipe.model_validate(
        {
            "name": "family",
            **models,
            "reserved": {"count": R},
            "divergence": {"support": 16},
            "candidates": {"k": K, "method": "top_k"},
            "collect": {"max_new_tokens": TOKENS, "steps": 0.2, "random_steps": 0.1, "k": 6},
            "distil": {
                "lora": {"rank": 4, "alpha": 8, "dropout": 0},
                **{"min_teacher_margin": 0, "batch": 4, "learning_rate": 0.01, "prior_weight": 0.5, "validation": 0.2},
            },
            "policies": {"local": {"prior_weight": 0.5}},
            "trigger_head": {"epochs": 3, "hidden": 8, "positives": 0.3, "validation": 0.4},
        }
    )


def _log_probabilities(model: Any, reserved: tuple[int, ...], rows: int) -> LogProbabilities:
    @torch.no_grad()
    def of(ids: list[int]) -> torch.Tensor:
        logits_V = model(torch.tensor([ids]), use_cache=False).logits[0, -1, :rows].clone()
        logits_V[list(reserved)] = -torch.inf
        return logits_V.log_softmax(-1)

    return of


def _collect(recipe: Recipe, folder: Path, slm: LogProbabilities, teacher: LogProbabilities) -> Path:
    """Eight prompts, half of them sampled, rolled out, labelled and published."""
    system = {"role": "system", "content": "Add."}
    prompts = [Prompt(f"p/{n}", [system, {"role": "user", "content": f"{n} + {n}"}]) for n in range(8)]
    given, engines = rows(prompts, recipe), pair(recipe)
    rollouts, labels = Rollouts(recipe, engines["slm"]), Labels(recipe, engines["teacher"])
    labelled = labels(rollouts(pa.Table.from_pylist(given, PROMPT)))
    rollouts.engine.close()  # type: ignore[attr-defined]
    labels.engine.close()  # type: ignore[attr-defined]
    found = labelled.to_pylist()
    assert not any(row["error"] for row in found)
    for row in (found[0], found[2]):  # greedy ones
        assert "Add." in row["prompt"]
        assert row["temperature"] == 0
        for step, written in enumerate(row["output_ids"][:12]):
            ids = row["prompt_ids"] + row["output_ids"][:step]
            slm_V, teacher_V = slm(ids), teacher(ids)
            assert written == int(slm_V.argmax())
            assert row["teacher_argmax_T"][step] == int(teacher_V.argmax())
            labels_K = row["kept"][step]
            np.testing.assert_allclose(labels_K["slm_logprobs_K"], slm_V[labels_K["candidates_K"]], atol=1e-3)
            np.testing.assert_allclose(labels_K["teacher_logprobs_K"], teacher_V[labels_K["candidates_K"]], atol=1e-3)
    file = folder / "labelled.arrow"
    file.write_bytes(sealed(labelled))
    metadata = shard_metadata(recipe, "slm", "teacher", "tokenizer", "file:p")
    (folder / "collection").mkdir()
    publish([file], len(given), folder / "collection", metadata, recipe)
    return folder / "collection"


def _distil(recipe: Recipe, collection: Path, folder: Path) -> None:
    data = ShardTrajectories(collection)
    trainer = Trainer(recipe, "selector", data)
    losses = [trainer.advance()["selection_loss"] for _ in range(12)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert trainer.evaluate()["kl_to_base"] > 0
    build(recipe, trainer.selector.trained(), data, None, provenance(), folder)


def _decode_and_audit(recipe: Recipe, folder: Path, teacher: LogProbabilities) -> None:
    artifact = Artifact.load(folder)
    always = Selection(-1e9, CandidateSettings(k=K, method="top_k"), 0.5, recipe.distil.temperature)
    tokenizer = loading.load_tokenizer(recipe.slm)
    prompt = tokenizer.encode("7 + 5 = ")
    local, judging = (
        load(hosted) for hosted in (Hosted("s2t-local", recipe.slm, artifact=folder), pair(recipe)["teacher"])
    )

    async def run() -> tuple[Draft, Selection]:
        everywhere = await local.generate_selecting(prompt, Sampling(TOKENS), always)  # type: ignore[attr-defined]
        selection = replace(always, threshold=float(np.median([decision.value for decision in everywhere.decisions])))
        draft = await local.generate_selecting(prompt, Sampling(TOKENS), selection)  # type: ignore[attr-defined]
        await judge(decisions := [asdict(one) for one in draft.decisions], prompt, draft.ids, judging)
        assert json.loads(json.dumps(decisions)) == decisions
        for decision in decisions:
            teacher_V = teacher(prompt + draft.ids[: decision["step"]])
            np.testing.assert_allclose(decision["teacher_K"], teacher_V[decision["candidates_K"]].exp(), atol=1e-4)
            assert decision["argmax"] == int(teacher_V.argmax())
        return draft, selection

    draft, selection = asyncio.run(run())
    local.close()
    judging.close()
    expected, triggered = _step_by_step(recipe, artifact, prompt, selection, len(draft.ids))
    assert draft.ids == expected
    assert [decision.step for decision in draft.decisions] == triggered
    assert 0 < len(triggered) < len(expected)


@torch.no_grad()
def _step_by_step(
    recipe: Recipe, artifact: Artifact, prompt: list[int], selection: Selection, length: int
) -> tuple[list[int], list[int]]:
    """S2T-Local written out over whole forwards: the text, and the steps that triggered."""
    model, head = loading.load_model(artifact.model(recipe.slm)), artifact.head()
    reserved, ranking_RH, bins_R = list(artifact.card.reserved_ids), artifact.ranking_head(), bins(R)

    def forward(ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        out = model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0, -1], out.logits[0, -1].clone()

    ids, triggered = list(prompt), []
    while len(ids) < len(prompt) + length:
        hidden_H, logits_V = forward(ids)
        logits_V[reserved] = -torch.inf
        token = int(logits_V.argmax())
        if head(hidden_H[None]).item() >= selection.threshold:
            triggered.append(len(ids) - len(prompt))
            logprobs_K, candidates_K = logits_V.log_softmax(-1).topk(K)
            preferences = []
            for candidate, logprob in zip(candidates_K.tolist(), logprobs_K.tolist(), strict=True):
                after_H, after_V = forward([*ids, candidate])
                z_R = after_V[reserved] if ranking_RH is None else ranking_RH @ after_H
                score = float(z_R.softmax(-1) @ bins_R)
                preferences.append(score / selection.temperature + selection.prior_weight * logprob)
            token = int(candidates_K[int(np.argmax(preferences))])
        ids.append(token)
    return ids[len(prompt) :], triggered
