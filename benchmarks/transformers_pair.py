"""A pair on the torch engine against transformers' own `generate`, and against the published way of labelling.

    python -m benchmarks.transformers_pair --slm DIR --teacher DIR [--dtype bfloat16] [--tokens 48] [--threads 2]

Decoding: greedy, the same prompts and lengths, one prompt at a time and 16 at a time, both models. Labelling: what a
labelled token costs where one teacher forward reads a whole answer, and where both models go through it a token at a
time with their caches, as the published scripts do (batch 1). Both sides run in turn in one process, so the ratios
hold whatever else the machine is doing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from s2t_models import chat, loading
from s2t_models.embedded.generator import problems
from s2t_models.engines.contract import Sampling
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.engines.torch.load import load
from s2t_models.hosting import pair
from s2t_models.recipe import Recipe

BATCHES = (1, 16)
_beginnings = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", default="embedded:slm", help="a folder or hub name")
    parser.add_argument("--teacher", default="embedded:teacher")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=48, help="decoded for each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sides = {
        side: {"path": path, "dtype": args.dtype, "device": "cpu", "slots": max(BATCHES), "context": 512}
        for side, path in (("slm", args.slm), ("teacher", args.teacher))
    }
    recipe = Recipe.model_validate({"name": "speed", **sides})
    tokenizer = loading.load_tokenizer(recipe.slm)
    prompts = [
        chat.prompt_ids(tokenizer, [{"role": "user", "content": problem.question}])
        for problem in problems("calibration", max(BATCHES))
    ]
    print(f"{'':<34}{'transformers':>14}{'engine':>10}{'ratio':>8}")
    engines = {name: _without_end(load(hosted)) for name, hosted in pair(recipe).items()}
    for name, engine in engines.items():
        model = loading.load_model(getattr(recipe, name))
        for batch in BATCHES:
            _row(f"{name}, {batch} at a time, tokens/s", *_decoding(model, engine, prompts[:batch], args))
    _row("labels, tokens/s", *_labelling(recipe, engines, prompts[:2], args))
    for engine in engines.values():
        engine.close()


def _row(name: str, theirs: float, ours: float) -> None:
    print(f"{name:<34}{theirs:>14.1f}{ours:>10.1f}{ours / theirs:>7.2f}x", flush=True)


def _without_end(engine: TorchEngine) -> TorchEngine:
    """Nothing ends a text: both sides decode as many tokens."""
    engine._card = replace(engine._card, end_ids=())
    return engine


def _decoding(
    model: PreTrainedModel, engine: TorchEngine, prompts: list[list[int]], args: argparse.Namespace
) -> tuple[float, float]:
    """Tokens a second of `generate` and of the engine, medians of the rounds."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def theirs() -> None:
        model.generate(  # type: ignore[operator]  # typed as a tensor or module
            ids, attention_mask=mask, do_sample=False, max_new_tokens=args.tokens, min_new_tokens=args.tokens
        )

    async def together() -> None:
        await asyncio.gather(*(engine.generate(_fresh(prompt), Sampling(args.tokens)) for prompt in prompts))

    return _speeds(len(prompts) * args.tokens, theirs, lambda: asyncio.run(together()), args.rounds)


def _fresh(prompt: list[int]) -> list[int]:
    """The prompt begun with another token, so that the engine has not read it before."""
    return [10 + next(_beginnings) % 200, *prompt[1:]]


def _labelling(
    recipe: Recipe, engines: dict[str, TorchEngine], prompts: list[list[int]], args: argparse.Namespace
) -> tuple[float, float]:
    """Labelled tokens a second: both models token by token, and a rollout's support scored in one forward."""
    models = [loading.load_model(settings) for settings in (recipe.slm, recipe.teacher)]
    support = recipe.divergence.support

    @torch.no_grad()
    def theirs() -> None:
        for prompt in prompts:
            caches = [DynamicCache(config=model.config) for model in models]
            fed = prompt
            for _ in range(args.tokens):
                slm_V, teacher_V = (
                    model(torch.tensor([fed]), past_key_values=cache, use_cache=True).logits[0, -1].log_softmax(-1)
                    for model, cache in zip(models, caches, strict=True)
                )
                _, top_N = slm_V.topk(support)
                teacher_V[top_N].exp()
                fed = [int(top_N[0])]

    async def label() -> None:
        async def one(prompt: list[int]) -> None:
            prompt = _fresh(prompt)
            draft = await engines["slm"].generate(prompt, Sampling(args.tokens, support=support))
            ids_TN: np.ndarray = draft.supported.ids_TN
            await engines["teacher"].score(prompt + draft.ids, len(prompt), ids_TN)

        await asyncio.gather(*(one(prompt) for prompt in prompts * (max(BATCHES) // len(prompts))))

    tokens = len(prompts) * args.tokens
    many = max(BATCHES) // len(prompts)
    slow, fast = _speeds(tokens, theirs, lambda: asyncio.run(label()), args.rounds)
    return slow, fast * many


def _speeds(tokens: int, theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """`tokens` by the median seconds of each side, run in turn after one round to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for side, run in zip(seconds, (theirs, ours), strict=True):
            began = time.perf_counter()
            run()
            side.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds[0][1:]), tokens / statistics.median(seconds[1][1:])


if __name__ == "__main__":
    main()
