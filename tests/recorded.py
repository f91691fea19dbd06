"""Recorded data for tests that need no model: graded rows with decisions, and a collection of shards, both
drawn from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.layout import SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.shards import shard_metadata, shard_name, write_shard
from pipelines.results.summary import write_results
from s2t_models.recipe import Recipe, load_recipe

RECIPE = Path(__file__).resolve().parent.parent / "cluster" / "recipes" / "embedded.yaml"
ITEMS = 40
SKILL = {"greedy": 0.3, "s2t": 0.8, "s2t@0.05": 0.6, "s2t-local": 0.5, "takeover": 0.8, "llm": 0.85}


def decision(rng: np.random.Generator, policy: str, agrees: bool) -> dict[str, Any]:
    """One triggered step: the teacher's token is among the candidates and chosen where `agrees`."""
    logprobs_K = np.sort(np.log(rng.dirichlet(np.ones(4))))[::-1]
    teacher_K = rng.dirichlet(np.ones(4))
    best = int(teacher_K.argmax())
    chosen = best if agrees else (best + 1) % 4
    row = {
        "step": int(rng.integers(0, 9)),
        "value": 1.0,
        "candidates_K": [10, 11, 12, 13],
        "logprobs_K": logprobs_K.tolist(),
        "scores_K": teacher_K.tolist(),
        "preferences_K": teacher_K.tolist(),
        "teacher_K": teacher_K.tolist(),
        "chosen": 10 + chosen,
        "argmax": 10 + best,
    }
    if policy.startswith("s2t-local"):
        scores_K = rng.random(4) / 2
        scores_K[chosen] = 0.9
        row |= {"scores_K": scores_K.tolist(), "preferences_K": scores_K.tolist()}
    return row


def recorded_results(path: Path, renamed: Mapping[str, str] | None = None, weights: str = "w", **metadata: str) -> Path:
    """A results file of six policies on 40 items with two seeds; answers are right where every decision
    agreed, mostly. `weights` is the hash of what s2t-local was answered by."""
    recipe = Recipe.model_validate_json(metadata["s2t.recipe"]) if "s2t.recipe" in metadata else load_recipe(RECIPE)
    rng = np.random.default_rng(0)
    hardness = rng.random(ITEMS)
    rows = []
    for policy, skill in SKILL.items():
        for seed in (0, 1):
            for item in range(ITEMS):
                correct = bool(hardness[item] + 0.2 * rng.random() < skill)
                asks = policy.startswith(("s2t", "takeover"))
                decisions = [decision(rng, policy, correct or rng.random() < 0.5) for _ in range(3)] if asks else []
                engines = ["slm"] if policy == "greedy" else ["slm", "teacher"] if asks else ["teacher"]
                cost = {"prefill": 30, "decode": 40, "leaves": 0, "forwards": 45}
                rows.append(
                    {
                        "key": f"{policy}/{seed}/{item}",
                        "task": "embedded",
                        "item": f"embedded/{item}",
                        "policy": (renamed or {}).get(policy, policy),
                        "kind": policy.partition("@")[0],
                        "k": recipe.candidates.k if asks else None,
                        "budget": float(policy.partition("@")[2] or recipe.budget) if asks else None,
                        "seed": seed,
                        "repeat": 0,
                        "request_seed": 1000 * seed + item,
                        "output": "so \\boxed{3}",
                        "samples": [],
                        "extracted": "3",
                        "answer": "3" if correct else "4",
                        "verdict": "correct" if correct else "truncated" if item == 39 else "wrong",
                        "score": float(correct),
                        "finish": "length" if item == 39 else "end",
                        "tokens": 40,
                        "usage": json.dumps(dict.fromkeys(engines, cost)),
                        "decisions": json.dumps(decisions),
                        "models": json.dumps(
                            {"s2t-local": weights} if policy == "s2t-local" else dict.fromkeys(engines, "w")
                        ),
                        "seconds": 0.5 + len(engines),
                        "client_seconds": 1.0 + len(engines),
                    }
                )
    write_results(
        path, rows, {"s2t.recipe": recipe.model_dump_json(), "s2t.splits": '{"test (embedded)": "abc"}'} | metadata
    )
    return path


def recorded_shards(folder: Path, rows: int = 12, length: int = 60) -> Recipe:
    """A finished collection of one shard, and the recipe it names; the last row is one with an error."""
    recipe = load_recipe(RECIPE)
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = []
    for row in range(rows):
        kl_T = rng.gamma(0.3, 1.0, length)
        # Where the models differ the teacher's token is seldom the SLM's first, and nearly always among its
        # first few.
        rank_T = np.minimum(rng.geometric(np.clip(1 - kl_T / 2, 0.3, 0.99)) - 1, 64)
        kept = [
            {
                "step": int(step),
                "by_kl": by_kl,
                "candidates_K": list(range(16)),
                "slm_logprobs_K": np.sort(np.log(rng.dirichlet(np.ones(16))))[::-1],
                "teacher_logprobs_K": np.log(rng.dirichlet(np.ones(16))),
            }
            for by_kl, steps in ((True, np.argsort(-kl_T)[:6]), (False, [0, 5]))
            for step in steps
        ]
        made.append(
            {
                "uid": f"p/{row}",
                "prompt": "q",
                "prompt_ids": [1, 2],
                "output_ids": [3] * length,
                "seed": row,
                "temperature": 0.0,
                "finish": "end",
                "kl_T": kl_T,
                "entropy_T": rng.random(length),
                "teacher_argmax_T": [3] * length,
                "teacher_rank_T": rank_T,
                "kept": kept,
                "error": None,
            }
        )
    made.append({"uid": "p/bad", "prompt": "", "error": "empty prompt: nothing to say"})
    (folder / SHARDS).mkdir(parents=True)
    metadata = shard_metadata(recipe, "a", "b", "c", "embedded-train")
    write_shard(folder / SHARDS / shard_name(0, 1), pa.Table.from_pylist(made, schema=SHARD), metadata)
    return recipe
