"""Pairs whose models have different numbers of vocabulary rows, as Qwen2.5 has: whatever decodes, no id comes out that
one of the two has not got."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import card
from tiny_families import FAMILIES, write_pair

from pipelines.analyse.audit import judge
from s2t_models import artifact, loading
from s2t_models.engines.load import load
from s2t_models.hosting import LOCAL, host
from s2t_models.policies import policy
from s2t_models.policies.base import Decoded, Engines, Request, gather
from s2t_models.policies.r2r_labels import label, numbers_differ
from s2t_models.recipe import Recipe
from s2t_models.reserved import reserved_rows
from s2t_models.trigger import TriggerHead

MORE_ROWS, TOKENS = 9, 16
POLICIES = ("greedy", "sample", "llm", "maj@2", "takeover", "s2t", "specreason", "multiplex", "s2t-local")


@pytest.fixture(params=["slm", "teacher"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    """A pair of which one has more rows, which it would choose at nearly every step; and an artifact of its SLM."""
    models = write_pair(FAMILIES["qwen2.5"], tmp_path, teacher_rows=MORE_ROWS)
    larger = models["teacher"]
    with torch.no_grad():
        larger.get_output_embeddings().weight[-MORE_ROWS:] *= 50
        larger.save_pretrained(tmp_path / "teacher")
    assert int(larger(torch.tensor([[5, 40, 41]])).logits[0, -1].argmax()) >= models["slm"].config.vocab_size
    folders = ("teacher", "slm") if request.param == "slm" else ("slm", "teacher")
    values: dict[str, Any] = {
        "name": "rows",
        **{
            side: {"path": str(tmp_path / folder), "dtype": "float32", "device": "cpu", "slots": 4, "context": 500}
            for side, folder in zip(("slm", "teacher"), folders, strict=True)
        },
        # The lowest free rows, so that those of one model alone are not masked as reserved ones.
        "reserved": {"first": models["slm"].config.vocab_size - FAMILIES["qwen2.5"].above},
        "divergence": {"support": 16},
        "candidates": {"k": 4, "method": "top_k"},
        "trigger": {"threshold": 0.01},
        "policies": {"specreason": {"step_tokens": 6}},
    }
    pair = Recipe.model_validate(values)
    _save_artifact(pair, tmp_path / "artifact")
    return pair.model_copy(update={"artifact": str(tmp_path / "artifact")})


def _save_artifact(recipe: Recipe, folder: Path) -> None:
    model, tokenizer = loading.load_model(recipe.slm), loading.load_tokenizer(recipe.slm)
    head = TriggerHead(model.config.hidden_size, 8)
    artifact.save(folder, model, tokenizer, head, card(recipe, {"head": {recipe.budget: -1e9}}))


def test_no_answer_holds_a_row_that_one_model_has_not_got(recipe: Recipe) -> None:
    hosting, tokenizer = host(recipe), loading.load_tokenizer(recipe.slm)
    common = min(loading.load_config(model).vocab_size for model in (recipe.slm, recipe.teacher))
    free = set(reserved_rows(recipe))
    prompt = tokenizer.encode("7 + 5 = ")
    running: dict[str, Any] = {name: load(hosted) for name, hosted in hosting.engines.items()}
    engines = Engines(running, tokenizer.decode, tokenizer.encode)
    decoded: dict[str, Decoded] = {}

    async def run() -> None:
        for name in POLICIES:
            decoded[name] = await gather(policy(name, hosting).decode(engines, Request(prompt, TOKENS)))
        await label(engines, prompt, numbers_differ, TOKENS, support=20, sentence_tokens=6)
        local = decoded[LOCAL]
        await judge(audited := [asdict(one) for one in local.decisions], prompt, local.ids, running["teacher"])
        assert all(decision["argmax"] < common for decision in audited)
        assert all(np.isfinite(decision["teacher_K"]).all() for decision in audited)

    try:
        asyncio.run(run())
    finally:
        for engine in running.values():
            engine.close()
    for name, answer in decoded.items():
        written = {*answer.ids, *(token for sample in answer.samples for token in sample)}
        proposed = {token for decision in answer.decisions for token in decision.candidates_K}
        assert written, name
        assert max(written | proposed) < common, name
        assert not (written | proposed) & free, name
    assert decoded[LOCAL].decisions
    assert decoded["takeover"].decisions
