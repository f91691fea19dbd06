"""The torch engine and vLLM, on one pair and its artifact: what each kind of work costs on either.

    python -m benchmarks.engines --recipe runs/real/recipe.yaml [--task gsm8k] [--data DIR] [--tokens 48] [--rounds 2]

Rollouts (greedy, with and without the support that labels need), labels, S2T-Local over greedy at several budgets, and
collaborative S2T and Takeover over the teacher alone; each with 1, 8 and 32 calls at once. Both engines of a model are
loaded at once and run in turn, so the ratios hold whatever else the machine is doing. Rates count the tokens that came
out, so texts that end early cost nobody anything. The models' threads follow the recipe's `num_cpus`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.tasks import load as load_task
from s2t_models import chat, loading
from s2t_models.engines.contract import Engine, Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import Hosting, host
from s2t_models.policies import policy
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.recipe import load_recipe
from s2t_models.threads import use_threads

KINDS = ("torch", "vllm")
#: One round of work on one engine at a given width; returns the tokens that came of it.
Work = Callable[[Engines, Sequence[list[int]]], Awaitable[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="runs/demo/recipe.yaml", help="a recipe with an artifact")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE")
    parser.add_argument("--task", default="embedded", help="whose problems are asked")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--widths", default="1,8,32", help="calls at once")
    parser.add_argument("--only", help="the works whose names begin so, several by commas: rollout,S2T-Local")
    args = parser.parse_args()
    hosting = host(load_recipe(args.recipe, args.set)).only(["slm", "teacher", "s2t-local"])
    use_threads(hosting.slm.settings.num_cpus)
    tokenizer = loading.load_tokenizer(hosting.tokenizer)
    widths = [int(width) for width in args.widths.split(",")]
    _, items = load_task(args.task, args.data)
    prompts = [chat.prompt_ids(tokenizer, item.prompt) for item in items[: max(widths)]]
    with ExitStack() as closing:
        pairs = {kind: _engines(hosting, kind, tokenizer, closing) for kind in KINDS}
        print(f"{'':<40}{'at once':>8}{'torch tokens/s':>16}{'vLLM tokens/s':>15}{'vLLM / torch':>14}")
        for name, work in _works(hosting, args.tokens).items():
            if args.only and not name.startswith(tuple(args.only.split(","))):
                continue
            for width in widths:
                asked = prompts[: max(width, 4)]
                torch_s, vllm_s = asyncio.run(_rates(work, pairs, asked, width, args.rounds))
                print(f"{name:<40}{width:>8}{torch_s:>16.1f}{vllm_s:>15.1f}{vllm_s / torch_s:>13.2f}x", flush=True)


def _engines(hosting: Hosting, kind: str, tokenizer: Any, closing: ExitStack) -> Engines:
    running: dict[str, Engine] = {}
    for name, hosted in hosting.engines.items():
        changed = hosted.settings.model_copy(update={"engine": kind, "num_gpus": 0.0 if kind == "vllm" else 1.0})
        if loading.device_of(hosted.settings) == "cpu":
            changed = changed.model_copy(update={"device": "cpu", "num_gpus": 0.0})
        running[name] = load(replace(hosted, settings=changed))
        closing.callback(running[name].close)
    return Engines(running, tokenizer.decode, tokenizer.encode)


def _works(hosting: Hosting, tokens: int) -> dict[str, Work]:
    support = hosting.recipe.divergence.support

    def generating(count: int) -> Work:
        async def work(engines: Engines, prompts: Sequence[list[int]]) -> int:
            drafts = await asyncio.gather(
                *(engines["slm"].generate(prompt, Sampling(tokens, support=count)) for prompt in prompts)
            )
            return sum(len(draft.ids) for draft in drafts)

        return work

    async def labelling(engines: Engines, prompts: Sequence[list[int]]) -> int:
        """Texts that are not read again: each round has another first token."""
        fresh = np.random.default_rng(time.monotonic_ns())
        ids_TN = np.tile(np.arange(support), (tokens, 1))
        texts = [[*prompt, *fresh.integers(10, 5000, tokens).tolist()] for prompt in prompts]
        await asyncio.gather(*(engines["teacher"].score(text, len(text) - tokens, ids_TN) for text in texts))
        return tokens * len(prompts)

    def decoding(name: str) -> Work:
        chosen = policy(name, hosting)

        async def work(engines: Engines, prompts: Sequence[list[int]]) -> int:
            decoded = await asyncio.gather(
                *(gather(chosen.decode(engines, Request(prompt, tokens))) for prompt in prompts)
            )
            return sum(len(one.ids) for one in decoded)

        return work

    calibrated = sorted(hosting.thresholds.get("head", {}))
    budgets = [budget for budget in (0.01, 0.05, 0.2) if budget in calibrated]
    return {
        "rollout": generating(0),
        f"rollout with the top {support}": generating(support),
        "labels": labelling,
        **{f"S2T-Local at {budget:.0%}": decoding(f"s2t-local@{budget:g}") for budget in budgets},
        "S2T": decoding("s2t"),
        "Takeover": decoding("takeover"),
        "the teacher alone": decoding("llm"),
    }


async def _rates(
    work: Work, pairs: dict[str, Engines], prompts: Sequence[list[int]], width: int, rounds: int
) -> tuple[float, float]:
    """Tokens a second of either engine, medians of the rounds after one to warm up."""
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds + 1):
        for kind in KINDS:
            began, tokens = time.perf_counter(), 0
            for first in range(0, len(prompts), width):
                tokens += await work(pairs[kind], prompts[first : first + width])
            rates[kind].append(tokens / (time.perf_counter() - began))
    return statistics.median(rates["torch"][1:]), statistics.median(rates["vllm"][1:])


if __name__ == "__main__":
    main()
