"""An engine as an actor of a job, and the engine contract over its handle: for jobs whose own actors call it for every
few tokens. A job that asks for whole answers asks the endpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import ray

from s2t_models.engines.contract import ContextOverflow, Draft, EngineDied, ModelCard, Sampling, Scores, Tell
from s2t_models.engines.load import load
from s2t_models.hosting import Hosted
from s2t_models.settings import ActorPool
from s2t_models.threads import use_threads
from serving import placement
from serving.written import keep_posted

#: How often Ray starts an actor again that has ended, with the calls that it had.
RESTARTS = 3


class EngineActor:
    """Holds one engine. It ends with it, and Ray starts it again."""

    def __init__(self, hosted: Hosted, num_cpus: float) -> None:
        use_threads(num_cpus)
        self._engine = load(hosted)
        keep_posted(self._engine, hosted.name)

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The engine's answer; that a call does not fit the context is told as a value, without a traceback."""
        try:
            return await getattr(self._engine, method)(*arguments)
        except ContextOverflow as told:
            return told
        except EngineDied:
            os._exit(1)


class ActorEngine:
    """The contract's core over the handle of an `EngineActor`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def card(self) -> ModelCard:
        return await self._call("card")

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        """A draft; it is not told of as it is written."""
        return await self._call("generate", prefix, sampling)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        return await self._call("score", tokens, start, ids_TN, support)

    def close(self) -> None:
        """Nothing to free here: the engine ends with its actor."""

    async def _call(self, method: str, *arguments: Any) -> Any:
        answer = await self._handle.call.remote(method, arguments)
        if isinstance(answer, ContextOverflow):
            raise answer
        return answer


@contextmanager
def engine_actors(hosted: Hosted, pool: ActorPool) -> Iterator[list[ActorEngine]]:
    """The engines of a pool of actors, for as long as the block runs. Raises RayError where one cannot start."""
    actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS)(EngineActor)
    handles: list[Any] = []
    with ExitStack() as placed:
        for _ in range(pool.actors):
            options = placed.enter_context(placement.remote_options(hosted.settings, pool.num_cpus, pool.num_gpus))
            handles.append(actor.options(**options).remote(hosted, pool.num_cpus))
            placed.callback(ray.kill, handles[-1])
        ray.get([handle.call.remote("card", ()) for handle in handles])
        yield [ActorEngine(handle) for handle in handles]
