"""A policy run for a request: its choices decoded at once, as pieces of text with what a client may ask about them.

The pieces are the same whether they are streamed or gathered. This module knows nothing of HTTP.

Axes: _N support.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from s2t_models import chat
from s2t_models.engines.contract import Decision, Engine, Finish, Support, Usage
from s2t_models.policies import base
from serving.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")


@dataclass(frozen=True)
class StepLogprobs:
    """A token's log-probability (None for the first of a text) and the most probable tokens there, best first."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass
class Piece:
    """What a choice has got since its last piece: text, tokens with their text and source, decisions, and
    log-probabilities where they were asked for."""

    choice: int
    text: str
    ids: list[int] = field(default_factory=list)
    tokens: list[tuple[str, base.Source]] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    logprobs: list[StepLogprobs] = field(default_factory=list)


@dataclass
class Ended:
    """The end of a choice; `samples` are the texts that were voted over. `finish` is "stop" for an end token and a stop
    text alike."""

    choice: int
    finish: Finish
    usage: dict[str, Usage]
    samples: list[str]


async def choice(
    number: int,
    policy: base.Policy,
    engines: base.Engines,
    tokenizer: PreTrainedTokenizerFast,
    request: base.Request,
    top: int | None = None,
) -> AsyncGenerator[Piece | Ended]:
    """Decode one choice; `top` asks for log-probabilities, of the token and of the `top` most probable ones."""
    text, output = TextStream(tokenizer, request.stop), list(request.prompt)
    done: base.Done | None = None
    place = nullcontext(engines) if policy.decodes_many else engines.place(policy.needs)
    async with place as placed, aclosing(policy.decode(placed, request)) as events:  # type: ignore[type-var]
        async for event in events:
            if isinstance(event, base.Span):
                certain, pieces = text.add(event.ids)
                logprobs = []
                if top is not None and event.support is not None and policy.scored_by is not None:
                    logprobs = await _logprobs(placed[policy.scored_by], output, event.ids, event.support, top)
                output += event.ids
                tokens = [(piece, event.source) for piece in pieces]
                yield Piece(number, certain, event.ids, tokens, logprobs=logprobs)
            elif isinstance(event, Decision):
                yield Piece(number, "", decisions=[event])
            else:
                done = event
    if done is None:
        raise RuntimeError(f"{policy.name} ended without saying so")
    yield Piece(number, text.end())
    samples = await asyncio.to_thread(_texts, tokenizer, done.samples) if done.samples else []
    yield Ended(number, "stop" if text.stopped else done.finish, done.usage, samples)


def _texts(tokenizer: PreTrainedTokenizerFast, samples: list[list[int]]) -> list[str]:
    return [chat.decode(tokenizer, ids) for ids in samples]


async def _logprobs(
    engine: Engine, before: list[int], ids: list[int], support: Support, top: int
) -> list[StepLogprobs]:
    """Those of the tokens `ids` behind `before`. A sampled token need not be among the most probable ones: it is then
    asked for."""
    steps = []
    for t, token in enumerate(ids):
        ids_N, logprobs_N = support.ids_TN[t], support.logprobs_TN[t]
        place = np.flatnonzero(ids_N == token)
        if len(place):
            logprob = float(logprobs_N[place[0]])
        else:
            state = before + ids[:t]
            logprob = float((await engine.score(state, len(state), np.array([[token]]))).logprobs_TN[0, 0])
        steps.append(StepLogprobs(token, logprob, _pairs(ids_N, logprobs_N, top)))
    return steps


async def prompt_logprobs(engine: Engine, prompt: list[int], top: int) -> tuple[list[StepLogprobs], Usage]:
    """Those of a prompt's own tokens, from one forward."""
    first = StepLogprobs(prompt[0], None, [])
    if len(prompt) == 1:
        return [first], Usage()
    scores = await engine.score(prompt, 1, np.array(prompt[1:])[:, None], max(top, 1))
    assert scores.support is not None
    rest = [
        StepLogprobs(token, float(logprob), _pairs(ids_N, logprobs_N, top))
        for token, logprob, ids_N, logprobs_N in zip(
            prompt[1:], scores.logprobs_TN[:, 0], scores.support.ids_TN, scores.support.logprobs_TN, strict=True
        )
    ]
    return [first, *rest], scores.usage


def _pairs(ids_N: np.ndarray, logprobs_N: np.ndarray, top: int) -> list[tuple[int, float]]:
    return list(zip(ids_N[:top].tolist(), logprobs_N[:top].tolist(), strict=True))


@dataclass(frozen=True)
class _Over:
    """A stream has come to its end, or failed."""

    error: Exception | None = None


async def merged(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """What the streams yield, as it comes. Where one fails the others are ended, and its error is raised."""
    queue: asyncio.Queue[T | _Over] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
        except Exception as error:
            queue.put_nowait(_Over(error))
        else:
            queue.put_nowait(_Over())

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if not isinstance(item, _Over):
                yield item
            elif item.error is not None:
                raise item.error
            else:
                running -= 1
    finally:
        for task in tasks:
            task.cancel()
