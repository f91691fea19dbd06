"""An engine as a Serve deployment, and the engine contract over a deployment handle.

`EngineDeployment` hosts one engine, `RemoteEngine` is what policies call. Calls carry their whole prefix, so any
replica can serve any call; those of one decode go to one replica (`decode_routing`). Neither knows of policies, text or
HTTP.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from s2t_models.engines.contract import (
    ContextOverflow,
    Draft,
    EngineDied,
    Finish,
    HasHealth,
    ModelCard,
    Routed,
    Sampling,
    Scores,
    Selected,
    Selection,
    Tell,
    Usage,
    Written,
)
from s2t_models.engines.load import load
from s2t_models.engines.telling import joined, told
from s2t_models.hosting import Hosted
from s2t_models.settings import MultiplexSettings, TahSettings
from s2t_models.threads import use_threads
from serving.decodes import Decode
from serving.written import keep_posted

#: A streamed draft is told of this often at the most, in seconds: a reader sees no difference, and a message a token of
#: a small model would cost more than the tokens.
PART_EVERY_S = 0.02


#: What a call fails with where its replica has ended.
LOST = (RayActorError, EngineDied)
#: How long a call waits for another replica, in seconds, before it fails.
ANOTHER_WITHIN_S = 15.0
#: Drafts that can go on behind tokens that are there. Multiplex reads mean embeddings, and Think-at-Hard second
#: passes, which are not.
GOES_ON = ("generate", "generate_selecting")


class EngineDeployment:
    """Hosts one engine in each replica; the `board`, where there is one, is told how many tokens it has written."""

    def __init__(self, hosted: Hosted, board: Any = None) -> None:
        use_threads(hosted.settings.num_cpus)
        self._engine = load(hosted)
        keep_posted(self._engine, hosted.name, board)

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """The engine's answer. A call that does not fit the context, or whose engine has died, is answered with the
        exception as a value: Serve writes a traceback to the log for every exception raised, and these are told the
        caller, or by `check_health`."""
        try:
            return await getattr(self._engine, method)(*arguments)
        except (ContextOverflow, EngineDied) as told:
            return told

    async def stream(self, method: str, arguments: tuple[Any, ...]) -> AsyncGenerator[Any]:
        """The parts of a draft as they are written, and the draft; exceptions as in `call`."""
        decode = getattr(self._engine, method)
        try:
            async with aclosing(told(lambda tell: decode(*arguments, tell=tell), PART_EVERY_S)) as parts:
                async for part in parts:
                    yield part
        except (ContextOverflow, EngineDied) as error:
            yield error

    async def answering(self) -> ModelCard | EngineDied:
        """The engine's card where it is well; else why not, as a value (see `call`)."""
        try:
            await self.check_health()
        except EngineDied as told:
            return told
        return await self._engine.card()

    async def check_health(self) -> None:
        """Serve replaces the replica where this raises, or does not answer."""
        if isinstance(self._engine, HasHealth):
            await self._engine.check_health()


class RemoteEngine:
    """The engine contract, with all that an engine may have beyond the core, over a handle. Raises what the engine
    raises; what the engine can do its card says."""

    def __init__(self, handle: DeploymentHandle) -> None:
        # Over gRPC: for the many small calls of collaborative decoding, Serve's way through Ray's actor calls costs
        # more than what they compute (Takeover took 1.4 times as long).
        self._handle = handle.options(_by_reference=False)
        # Serve's gRPC would take an `http_proxy` of the environment to the next replica; Ray's own gRPC never does.
        os.environ["grpc_proxy"] = ""  # noqa: SIM112
        self._cards: list[ModelCard] = []  # one, once it has been asked for
        self._decode: Decode | None = None

    def of(self, decode: Decode) -> RemoteEngine:
        """The engine for the calls of one decode, which go to one replica."""
        engine = copy.copy(self)
        engine._decode = decode
        return engine

    async def card(self) -> ModelCard:
        if not self._cards:
            self._cards.append(await self._call("card"))
        return self._cards[0]

    async def answering(self) -> ModelCard:
        """The card, asked anew of a replica. Raises EngineDied where its engine is not well, and waits while there is
        no replica."""
        response = self._handle.answering.remote()
        try:
            answer = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        if isinstance(answer, EngineDied):
            raise answer
        return answer

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        return await self._draft("generate", tell, prefix, sampling)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        return await self._call("score", tokens, start, ids_TN, support)

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        return await self._call("select", prefix, candidates_K)

    async def generate_selecting(
        self, prefix: list[int], sampling: Sampling, selection: Selection, tell: Tell | None = None
    ) -> Draft:
        return await self._draft("generate_selecting", tell, prefix, sampling, selection)

    async def generate_multiplex(
        self, prefix: list[int], sampling: Sampling, settings: MultiplexSettings, tell: Tell | None = None
    ) -> Draft:
        return await self._draft("generate_multiplex", tell, prefix, sampling, settings)

    async def generate_thinking(
        self, prefix: list[int], sampling: Sampling, settings: TahSettings, tell: Tell | None = None
    ) -> Draft:
        return await self._draft("generate_thinking", tell, prefix, sampling, settings)

    async def route(self, tokens: list[int], start: int) -> Routed:
        return await self._call("route", tokens, start)

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        return await self._call("features", tokens, start, support)

    def close(self) -> None:
        """Nothing to free here: the engine ends with its deployment."""

    async def _draft(self, method: str, tell: Tell | None, prefix: list[int], asked: Sampling, *more: Any) -> Draft:
        """A draft, told of as it is written where `tell` is given. Where its replica ends half-way, another goes on
        behind the tokens that are there: noise goes by (seed, step), so the text is the same."""
        if tell is None:
            return await self._call(method, prefix, asked, *more)
        begun = Written([])

        def note(part: Written) -> None:
            nonlocal begun
            begun = joined([begun, part])
            tell(part)

        try:
            return await self._stream(method, note, prefix, asked, *more)
        except LOST as error:
            if method not in GOES_ON and begun.ids:
                raise
            await self._another(error)
        done = len(begun.ids)
        has_ended = begun.ids[-1:] and begun.ids[-1] in (await self.card()).end_ids
        if has_ended or done >= asked.max_tokens:  # its last token came, and its end did not
            finish: Finish = "end" if has_ended else "length"
            return Draft(begun.ids, finish, Usage(decode=done), begun.support, None, begun.decisions)
        rest = replace(asked, max_tokens=asked.max_tokens - done, first_step=asked.first_step + done)
        draft = await self._stream(method, tell, [*prefix, *begun.ids], rest, *more)
        whole = joined([begun, Written(draft.ids, draft.support, draft.decisions)])
        usage = draft.usage + Usage(decode=done)
        return Draft(whole.ids, draft.finish, usage, whole.support, draft.triggered, whole.decisions)

    async def _stream(self, method: str, tell: Tell, *arguments: Any) -> Draft:
        answer: Any = None
        parts: Any = self._method("stream", stream=True).remote(method, arguments)
        try:
            async for part in parts:
                if isinstance(part, Written):
                    tell(part)
                else:
                    answer = part
        finally:
            parts.cancel()
        return _answered(answer)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """A call carries all that it needs: where its replica ends under it, another one is asked."""
        try:
            return _answered(await self._method("call").remote(method, arguments))
        except LOST as error:
            await self._another(error)
            return _answered(await self._method("call").remote(method, arguments))

    def _method(self, name: str, stream: bool = False) -> DeploymentHandle:
        session = self._decode.id if self._decode else ""
        return self._handle.options(method_name=name, session_id=session, stream=stream)

    async def _another(self, error: Exception) -> None:
        """Wait for a replica that answers; raise `error` where none does soon."""
        if self._decode:
            self._decode.lose(self._handle.deployment_name)
        try:
            async with asyncio.timeout(ANOTHER_WITHIN_S):
                while True:
                    try:
                        await self.answering()
                        return
                    except LOST:
                        await asyncio.sleep(0.25)
        except TimeoutError:
            raise error from None


def _answered(answer: Any) -> Any:
    if isinstance(answer, ContextOverflow | EngineDied):
        raise answer
    return answer
