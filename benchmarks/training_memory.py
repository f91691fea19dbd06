"""What one optimiser step of distilling takes: peak memory, seconds and tokens a second, by size of the micro-batch.

    python -m benchmarks.training_memory [--model DIR] [--dtype bfloat16] [--trajectories 8] [--tokens 350]

Trajectories are made up: random tokens, with groups of candidates spread over the answer, as `distil` would train on
them. Each line is a process of its own, so that its peak is its own. All lines do the same work: their losses after
the last step agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

WARM_UP, STEPS = 1, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:slm", help="a folder or hub name")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trajectories", type=int, default=8, help="in one optimiser step")
    parser.add_argument("--tokens", type=int, default=350, help="of prompt and answer, a third of it prompt")
    parser.add_argument("--groups", type=int, default=30, help="labelled steps a trajectory")
    parser.add_argument("--k", type=int, default=8, help="candidates a step")
    parser.add_argument("--ids", type=int, default=200, help="the tokens are drawn from the first so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args, **json.loads(args.one))))
        return
    header = (
        f"{'objective':<10}{'micro_batch':>12}{'checkpointing':>15}{'peak GiB':>10}{'s a step':>10}{'tokens/s':>10}"
    )
    print(f"{header}{'loss':>12}")
    for objective in ("selector", "kd"):
        for micro_batch, checkpointing in ((8192, False), (2048, False), (1024, False), (2048, True)):
            case = {"objective": objective, "micro_batch": micro_batch, "checkpointing": checkpointing}
            command = [sys.executable, "-m", "benchmarks.training_memory", *sys.argv[1:], "--one", json.dumps(case)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["killed: out of memory"])[-1]
                print(f"{objective:<10}{micro_batch:>12}{checkpointing!s:>15}  {reason}")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{objective:<10}{micro_batch:>12}{checkpointing!s:>15}{found['peak']:>10.2f}{found['seconds']:>10.1f}"
                f"{found['tokens'] / found['seconds']:>10.0f}{found['loss']:>12.5f}",
                flush=True,
            )


def _measure(args: argparse.Namespace, objective: str, micro_batch: int, checkpointing: bool) -> dict[str, Any]:
    import torch

    from s2t_models.recipe import Recipe
    from s2t_models.training.trainer import Trainer

    torch.set_num_threads(args.threads)
    model = {"path": args.model, "dtype": args.dtype, "device": "cpu"}
    distil = {
        "lora": {"rank": 32, "alpha": 64, "dropout": 0},
        "prior_weight": 1.0,
        "min_teacher_margin": 0,
        "batch": args.trajectories,
        "validation": 0.1,
        "micro_batch": micro_batch,
        "gradient_checkpointing": checkpointing,
    }
    recipe = Recipe.model_validate({"name": "memory", "slm": model, "teacher": model, "distil": distil})
    trainer = Trainer(recipe, objective, made_up_trajectories(args))
    tokens = sum(trainer._length(item) for item in trainer.training)
    for _ in range(WARM_UP):
        trainer.advance()
    began = time.perf_counter()
    for _ in range(STEPS):
        figures = trainer.advance()
    seconds = (time.perf_counter() - began) / STEPS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak": peak, "seconds": seconds, "tokens": tokens, "loss": figures["loss"]}


def made_up_trajectories(args: argparse.Namespace) -> list[Any]:
    """One more than a step trains on: the first prompt is held out."""
    import numpy as np

    from s2t_models.training.batches import Trajectory
    from s2t_models.training.tree import Tree

    rng = np.random.default_rng(0)

    def trajectory(number: int) -> Trajectory:
        prompt = args.tokens // 3
        steps = np.sort(rng.choice(args.tokens - prompt, args.groups, replace=False))
        candidates_GK = rng.integers(0, args.ids, (args.groups, args.k))
        # Of two draws the second: tests rest on these rows.
        _, teacher_GK = rng.dirichlet(np.ones(args.k), (2, args.groups)).astype(np.float32)
        tree = Tree(rng.integers(0, args.ids, args.tokens), prompt, prompt + steps, candidates_GK)
        noise_T = rng.random(args.tokens - prompt, dtype=np.float32)
        is_top_G = np.ones(args.groups, dtype=bool)
        return Trajectory(
            f"made-up/{number}",
            f"prompt {number}",
            tree,
            noise_T,
            noise_T,
            rng.integers(0, args.ids, args.tokens - prompt),
            is_top_G,
            np.log(teacher_GK),
        )

    return [trajectory(number) for number in range(args.trajectories + 1)]


if __name__ == "__main__":
    main()
