"""Labelling against token-by-token decoding of both models, on the embedded pair.

    python -m benchmarks.labelling [--problems 1024] [--decoded 8] [--slots 96] [--batch 256]

Labelling is what the collect pipeline does on two cores with two actors of each kind: rollout processes decode batches
of prompts, label processes take one teacher forward a trajectory and draw the candidates of every step. The other side
is the published way: one prompt at a time, both models a token at a time with their KV caches, the KL at each step.
Both sides run here one after the other, on one thread a process and on the same prompts (the slow side on the first
few), and are compared by time a token: by the clock, which wants an idle machine, and by the CPU of all processes
together. `labels alone` leaves the rollouts out, which both ways need: what it costs to label text.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from s2t_models.recipe import Recipe

_actor: Any = None


def _start(kind: str, recipe: Recipe) -> None:
    global _actor
    import torch

    from pipelines.collect import actors as labelling
    from s2t_models.hosting import pair

    torch.set_num_threads(1)
    hosted = pair(recipe)["slm" if kind == "Rollouts" else "teacher"]
    _actor = getattr(labelling, kind)(recipe, hosted)


def _work(rows: pa.Table) -> tuple[pa.Table, float]:
    """What the process's actor makes of the rows, and the CPU seconds it took."""
    begin = time.process_time()
    return _actor(rows), time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", type=int, default=1024, help="prompts that are labelled")
    parser.add_argument("--decoded", type=int, default=8, help="of these, prompts that are decoded token by token")
    parser.add_argument("--slots", type=int, default=96, help="rollouts that an SLM decodes at once")
    parser.add_argument("--batch", type=int, default=256, help="prompts that are handed on at once")
    parser.add_argument("--actors", type=int, default=2, help="processes of each kind")
    arguments = parser.parse_args()

    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import DynamicCache, PreTrainedModel

    from pipelines.collect.schemas import PROMPT
    from s2t_models import loading
    from s2t_models.divergence import divergence
    from s2t_models.embedded.generator import problems
    from s2t_models.recipe import Recipe
    from s2t_models.reserved import reserved_rows
    from s2t_models.settings import CollectSettings, ModelSettings

    torch.set_num_threads(1)
    recipe = Recipe(
        name="labelling",
        slm=ModelSettings(path="embedded:slm", dtype="float32", device="cpu", slots=arguments.slots),
        teacher=ModelSettings(path="embedded:teacher", dtype="float32", device="cpu"),
        collect=CollectSettings(max_new_tokens=256),
    )
    rows = [
        {
            "uid": problem.uid,
            "messages": json.dumps([{"role": "user", "content": problem.question}]),
            "seed": 0,
            "temperature": 0.0,
        }
        for problem in problems("train", arguments.problems)
    ]
    prompts = pa.Table.from_pylist(rows, PROMPT)
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(arguments.actors, spawn, _start, ("Rollouts", recipe)) as rollouts,
        ProcessPoolExecutor(arguments.actors, spawn, _start, ("Labels", recipe)) as labels,
    ):
        for _ in range(2):  # the first forwards set things up
            first = [rollouts.submit(_work, prompts.slice(0, 16)) for _ in range(4 * arguments.actors)]
            for future in [labels.submit(_work, future.result()[0]) for future in first]:
                future.result()
        clock, cpu = time.perf_counter(), time.process_time()
        batches = range(0, len(prompts), arguments.batch)
        rolling = [rollouts.submit(_work, prompts.slice(at, arguments.batch)) for at in batches]
        labelling, rollout_cpu = [], 0.0
        for future in as_completed(rolling):
            rolled_out, seconds = future.result()
            rollout_cpu += seconds
            labelling.append(labels.submit(_work, rolled_out))
        done = [future.result() for future in labelling]
        seconds = time.perf_counter() - clock
        label_cpu = sum(cpu for _, cpu in done)
        whole_cpu = label_cpu + rollout_cpu + time.process_time() - cpu
    labelled = [row for table, _ in done for row in table.to_pylist()]
    tokens = sum(len(row["output_ids"]) for row in labelled)

    models = [loading.load_model(settings) for settings in (recipe.slm, recipe.teacher)]
    masked = torch.tensor(reserved_rows(recipe), dtype=torch.long)

    def log_probabilities(model: PreTrainedModel, ids: list[int], cache: DynamicCache) -> torch.Tensor:
        logits_V = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        return logits_V.index_fill(0, masked, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def token_by_token(row: dict[str, Any]) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        kl_T: list[float] = []
        fed = row["prompt_ids"]
        caches = [DynamicCache(config=model.config) for model in models]
        while len(ids) < len(row["output_ids"]):
            slm_V, teacher_V = (
                log_probabilities(model, fed, cache) for model, cache in zip(models, caches, strict=True)
            )
            slm_N, top_N = slm_V.topk(recipe.divergence.support)
            kl_T.append(divergence(slm_N[None], teacher_V[top_N][None]).item())
            fed = [int(top_N[0])]
            ids += fed
        return ids, kl_T

    few = labelled[: arguments.decoded]
    token_by_token(few[0])
    clock, cpu = time.perf_counter(), time.process_time()
    decoded = [token_by_token(row) for row in few]
    decode_seconds, decode_cpu = time.perf_counter() - clock, time.process_time() - cpu
    decoded_tokens = sum(len(ids) for ids, _ in decoded)

    sides = {
        "both models, token by token": (len(few), decoded_tokens, decode_seconds, decode_cpu),
        "rollouts and labels": (len(labelled), tokens, seconds, whole_cpu),
        "labels alone": (len(labelled), tokens, None, label_cpu),
    }
    slow_clock, slow_cpu = decode_seconds / decoded_tokens, decode_cpu / decoded_tokens
    print(f"{'':<28} {'prompts':>8} {'tokens':>8} {'us/token':>9} {'ratio':>8} {'CPU us/token':>13} {'ratio':>8}")
    for name, (count, size, clocked, cpu) in sides.items():
        by_clock = f"{1e6 * clocked / size:9.0f} {slow_clock * size / clocked:7.1f}x" if clocked else f"{'':>18}"
        print(f"{name:<28} {count:8d} {size:8d} {by_clock} {1e6 * cpu / size:13.0f} {slow_cpu * size / cpu:7.1f}x")
    equal = [(row, kl_T) for row, (ids, kl_T) in zip(few, decoded, strict=True) if ids == row["output_ids"]]
    apart = max((float(np.abs(np.array(row["kl_T"]) - kl_T).max()) for row, kl_T in equal), default=float("nan"))
    print(f"texts equal: {len(equal)} of {len(few)}; largest difference in KL: {apart:.1e}")


if __name__ == "__main__":
    main()
