"""Shard rows for tests of training, made as `s2t collect` makes them but from written solutions in place of
rollouts."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.tasks import task
from pipelines.tasks.splits import fingerprint
from s2t_models.divergence import divergence
from s2t_models.loading import load_model, load_tokenizer
from s2t_models.recipe import Recipe


def labelled_rows(recipe: Recipe, task_name: str, count: int) -> list[dict[str, Any]]:
    """The first `count` problems' solutions with both models' labels, each cut at 24 tokens; every fourth step is
    kept."""
    slm, teacher, tokenizer = load_model(recipe.slm), load_model(recipe.teacher), load_tokenizer(recipe.slm)
    rows = []
    for item in task(task_name).load()[:count]:
        prompt = tokenizer.apply_chat_template(item.prompt, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        output_ids = tokenizer.encode(item.metadata["solution"], add_special_tokens=False)[:24]
        steps = slice(len(prompt_ids) - 1, -1)
        with torch.no_grad():
            ids = torch.tensor([prompt_ids + output_ids])
            slm_TV, teacher_TV = (model(ids).logits[0, steps].log_softmax(-1) for model in (slm, teacher))
        top_TN = slm_TV.topk(64).indices
        kl_T = divergence(slm_TV.gather(1, top_TN), teacher_TV.gather(1, top_TN))
        kept = [
            {
                "step": t,
                "by_kl": t % 8 == 0,
                "candidates_K": top_TN[t, :16].tolist(),
                "slm_logprobs_K": slm_TV[t, top_TN[t, :16]].tolist(),
                "teacher_logprobs_K": teacher_TV[t, top_TN[t, :16]].tolist(),
            }
            for t in range(0, len(output_ids), 4)
        ]
        rows.append(
            {
                "uid": item.uid,
                "questions": sorted(fingerprint([item])),
                "prompt": prompt,
                "prompt_ids": prompt_ids,
                "output_ids": output_ids,
                "seed": 0,
                "temperature": 0.0,
                "finish": "end",
                "teacher_read": len(prompt_ids) + len(output_ids),
                "kl_T": kl_T.tolist(),
                "entropy_T": (-(slm_TV.exp() * slm_TV).sum(-1)).tolist(),
                "teacher_argmax_T": teacher_TV.argmax(-1).tolist(),
                "teacher_rank_T": [0] * len(output_ids),
                "kept": kept,
                "error": None,
            }
        )
    return rows


def failed_row(task_name: str, number: int) -> dict[str, Any]:
    """The row of the task's problem of that number, which failed."""
    item = task(task_name).load()[number]
    return {"uid": item.uid, "questions": sorted(fingerprint([item])), "error": "empty prompt"}


def disagreeing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with labels moved on by one candidate: there the teacher prefers what the SLM does not."""
    for step in (step for row in rows for step in row["kept"] or ()):
        step["teacher_logprobs_K"] = step["teacher_logprobs_K"][-1:] + step["teacher_logprobs_K"][:-1]
    return rows
