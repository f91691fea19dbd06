"""The engine called directly, in a process of its own: what the endpoint's cost is compared with."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from s2t_models.recipe import Recipe

if TYPE_CHECKING:
    from s2t_models.engines.contract import Engine

_runner: asyncio.Runner
_engine: Engine
_tokenizer: Any


class DirectEngine:
    """The recipe's SLM in a process that does nothing else, with the threads that a replica has."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def greedy(self, questions: Sequence[str], max_tokens: int, width: int) -> float:
        """The process's CPU seconds while it answers the questions, `width` at once. Tokenising counts: the endpoint
        does it too."""
        return self._pool.submit(_greedy, questions, max_tokens, width).result()


@contextmanager
def direct_engine(recipe: Recipe) -> Iterator[DirectEngine]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _start, (recipe,)) as pool:
        yield DirectEngine(pool)


def _start(recipe: Recipe) -> None:
    global _runner, _engine, _tokenizer
    from s2t_models import loading
    from s2t_models.engines.load import load
    from s2t_models.hosting import pair
    from s2t_models.threads import use_threads

    use_threads(recipe.slm.num_cpus)
    _runner, _engine = asyncio.Runner(), load(pair(recipe)["slm"])
    _tokenizer = loading.load_tokenizer(recipe.slm)


def _greedy(questions: Sequence[str], max_tokens: int, width: int) -> float:
    from s2t_models import chat
    from s2t_models.engines.contract import Sampling

    waiting = iter(questions)

    async def work() -> None:
        for question in waiting:
            prompt = chat.prompt_ids(_tokenizer, [{"role": "user", "content": question}])
            draft = await _engine.generate(prompt, Sampling(max_tokens))
            chat.decode(_tokenizer, draft.ids)

    async def everyone() -> None:
        await asyncio.gather(*(work() for _ in range(width)))

    began = time.process_time()
    _runner.run(everyone())
    return time.process_time() - began
