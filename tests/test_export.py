"""An exported artifact in a process that cannot import this project: the engine's tokens, from transformers alone."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up import provenance
from safetensors.torch import load_file
from tiny_families import FAMILIES, write_pair

from benchmarks.training_memory import made_up_trajectories
from pipelines.export import main
from s2t_models import loading
from s2t_models.artifact import Artifact
from s2t_models.engines.contract import Sampling, Selection
from s2t_models.engines.load import load
from s2t_models.hosting import Hosted
from s2t_models.recipe import Recipe
from s2t_models.settings import CandidateSettings, TriggerSettings
from s2t_models.training.build import build
from s2t_models.training.trainer import Trainer

K, TOKENS, WARMUP = 4, 24, 2
#: Decodes prompts with an exported folder and prints the ids as JSON: S2T-Local's at each threshold, then plain ones.
STRANGER = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("s2t_models", "pipelines", "serving", "ray"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder, prompts, thresholds, tokens = sys.argv[1], *map(json.loads, sys.argv[2:])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
longest = max(map(len, prompts))
ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
ours = {"custom_generate": folder, "trust_remote_code": True}
local = [
    model.generate(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), **ours,
                   max_new_tokens=tokens, threshold=threshold, seed=5)[:, longest:].tolist()
    for threshold in thresholds
]

class Heard:
    put_in = []

    def put(self, value):
        self.put_in.append(value.tolist())

    def end(self):
        self.put_in.append("end")

first = torch.tensor(prompts[:1])
model.generate(first, streamer=Heard(), generation_config=GenerationConfig(max_new_tokens=tokens), seed=5, **ours)
plain = [
    model.generate(torch.tensor([p]), max_new_tokens=tokens, do_sample=False)[0, len(p):].tolist() for p in prompts
]
refused = []
for asked in (
    {"num_beams": 4}, {"generation_config": GenerationConfig(do_sample=True)}, {"streamer": Heard()},
    {"max_new_tokens": 0}, {"budget": 0.7},
):
    try:
        model.generate(ids, **ours, **asked)
    except ValueError as error:
        refused.append(str(error))
print(json.dumps({"local": local, "plain": plain, "refused": refused, "heard": Heard.put_in,
                  "template": bool(tokenizer.chat_template)}))
"""


def train(name: str, folder: Path) -> tuple[Recipe, Artifact]:
    """A tiny model of the family, its selector trained for a few steps on made-up labels."""
    write_pair(FAMILIES[name], folder)
    models = {
        side: {"path": str(folder / side), "dtype": "float32", "device": "cpu", "slots": 4, "context": 200}
        for side in ("slm", "teacher")
    }
    distil = {
        "lora": {"rank": 4, "alpha": 8, "dropout": 0},
        **{"min_teacher_margin": 0, "batch": 4, "learning_rate": 0.02, "validation": 0.3, "prior_weight": 0.5},
    }
    head = {"epochs": 2, "hidden": 8, "positives": 0.3, "validation": 0.4}
    recipe = Recipe.model_validate(
        {
            "name": "export",
            **models,
            "distil": distil,
            "trigger_head": head,
            "policies": {"local": {"prior_weight": 0.5}},
        }
    )
    data = made_up_trajectories(Namespace(trajectories=7, tokens=40, groups=6, k=K, ids=60))
    trainer = Trainer(recipe, "selector", data)
    for _ in range(4):
        trainer.advance()
    build(recipe, trainer.selector.trained(), data, None, provenance(settings={"budget": 0.05}), folder / "artifact")
    return recipe, Artifact.load(folder / "artifact")


@pytest.mark.parametrize(
    ("name", "proposing"),
    [
        ("qwen2.5", {"method": "multinomial", "temperature": 0.8, "top_p": 0.9}),
        ("gemma3", {"method": "top_k", "ratio": 0.6}),
        pytest.param("mistral", {"method": "top_k"}, marks=pytest.mark.slow),
    ],
)
def test_a_stranger_decodes_what_the_engine_does(name: str, proposing: dict[str, Any], tmp_path: Path) -> None:
    """With reserved rows above the vocabulary and within it, and with a ranking head; sliding windows; drawn and
    dynamic candidates; steps that never trigger; settings of the base's that plain decoding must not take over."""
    recipe, artifact = train(name, tmp_path)
    base_settings = artifact.folder / "model" / "generation_config.json"
    sampling = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.8}
    base_settings.write_text(json.dumps(json.loads(base_settings.read_text()) | sampling))
    candidates = CandidateSettings(k=K, **proposing)
    exported = tmp_path / "exported"
    (tmp_path / "recipe.json").write_text(
        recipe.model_copy(
            update={"candidates": candidates, "budget": 0.05, "trigger": TriggerSettings(warmup=WARMUP)}
        ).model_dump_json()
    )
    assert main([str(artifact.folder), str(exported), "--recipe", str(tmp_path / "recipe.json")]) == 0
    assert artifact.card.reserved_ids or name == "mistral"

    tokenizer = loading.load_tokenizer(recipe.slm)
    texts = ("7 + 5 = ", "What is 12 * 3?", "a", "One more. " * 3, *(f"{n} * {n + 1}, then?" for n in range(8)))
    prompts = [tokenizer.encode(text) for text in texts]
    engine = load(Hosted("s2t-local", recipe.slm, artifact=artifact.folder))
    always = Selection(-1e9, candidates, 0.5, artifact.card.temperature, WARMUP)
    calibrated = artifact.card.thresholds["head"][0.05]

    async def decode(selection: Selection) -> list[Any]:
        calls = [engine.generate_selecting(p, Sampling(TOKENS, seed=5), selection) for p in prompts]  # type: ignore[attr-defined]
        return list(await asyncio.gather(*calls))

    async def plainly() -> list[Any]:
        return list(await asyncio.gather(*(engine.generate(p, Sampling(TOKENS)) for p in prompts)))

    everywhere = asyncio.run(decode(always))
    median = float(np.median([one.value for draft in everywhere for one in draft.decisions]))
    sometimes, plain = asyncio.run(decode(replace(always, threshold=median))), asyncio.run(plainly())
    by_default = asyncio.run(decode(replace(always, threshold=calibrated)))
    engine.close()
    assert min(one.step for draft in everywhere for one in draft.decisions) == WARMUP
    sizes = {len(one.candidates_K) for draft in everywhere for one in draft.decisions}
    assert (len(sizes) > 1) == ("ratio" in proposing)
    assert max(sizes) <= K
    fired = sum(len(draft.decisions) for draft in sometimes)
    assert 0 < fired < sum(len(draft.decisions) for draft in everywhere)

    found = stranger(exported, prompts, [-1e9, median, None])
    for drafts, written in zip((everywhere, sometimes, by_default), found["local"], strict=True):
        assert [text[: len(draft.ids)] for draft, text in zip(drafts, written, strict=True)] == [d.ids for d in drafts]
    assert [text[: len(draft.ids)] for draft, text in zip(plain, found["plain"], strict=True)] == [d.ids for d in plain]
    assert found["heard"] == [prompts[0], *([token] for token in by_default[0].ids), "end"]
    assert [line.split()[0] for line in found["refused"]] == [
        "num_beams:",
        "do_sample:",
        "streamer:",
        "max_new_tokens",
        "budget",
    ]
    assert found["template"]


def stranger(folder: Path, prompts: list[list[int]], thresholds: list[float | None]) -> dict[str, Any]:
    command = [sys.executable, "-c", STRANGER, str(folder), *map(json.dumps, (prompts, thresholds, TOKENS))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_adapter_loads_in_plain_peft_and_the_card_says_what_was_measured(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe, artifact = train("llama3", tmp_path)
    (tmp_path / "slm" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    exported = tmp_path / "exported"
    assert main([str(artifact.folder), str(exported), "--budget", "0.1"]) == 0
    base = AutoModelForCausalLM.from_pretrained(recipe.slm.path)
    merged = AutoModelForCausalLM.from_pretrained(exported)
    ids = torch.randint(30, (2, 12))
    text = torch.ones(merged.config.vocab_size, dtype=torch.bool)
    text[list(artifact.card.reserved_ids)] = False
    adapted = PeftModel.from_pretrained(base, exported / "adapter")
    assert (merged(ids).logits - AutoModelForCausalLM.from_pretrained(recipe.slm.path)(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(adapted(ids).logits[..., text], merged(ids).logits[..., text], atol=1e-4, rtol=0)
    assert load_file(exported / "adapter" / "adapter_model.safetensors")
    card = (exported / "README.md").read_text()
    assert "0.1 unless said" in card
    assert "license: apache-2.0" in card.split("---")[1]
    assert provenance().base_weights in card
    assert str(tmp_path) not in card.replace(recipe.slm.path, "")  # no folder of this machine but the base's own name
    assert json.loads((exported / "s2t.json").read_text())["budget"] == 0.1


def test_a_recipe_fixes_the_threshold_and_may_not_contradict_the_artifact(
    tmp_path: Path, untrained_artifact: Path, recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [str(untrained_artifact), str(tmp_path / "out"), "--recipe", str(recipe_path), "--set"]
    assert main([*asked, "trigger.head_threshold=0.75"]) == 0
    assert json.loads((tmp_path / "out" / "s2t.json").read_text())["threshold"] == pytest.approx(np.log(3))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the recipe's fixed threshold unless said" in card
    assert "adapter" not in card  # this artifact has none
    assert main([*asked, "policies.local.prior_weight=0.25"]) == 2
    assert "the recipe says 0.25" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused_in_a_line(
    tmp_path: Path, untrained_artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(untrained_artifact), str(tmp_path / "out"), "--budget", "0.33"]) == 2
    assert "has no threshold for a budget of 0.33; it has 0.1" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert main([str(untrained_artifact), str(tmp_path / "mine"), "--budget", "0.1"]) == 2
    message = capsys.readouterr().err
    assert "exists and holds something else" in message
    assert message.count("\n") == 1
    assert main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "no such artifact directory" in capsys.readouterr().err
