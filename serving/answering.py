"""From what a request asked to what HTTP answers: whole, streamed, or an error in OpenAI's shape."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from s2t_models.engines.contract import ContextOverflow, EngineDied
from s2t_models.errors import one_line
from serving import decoding, metrics
from serving import openai_answers as answers
from serving import openai_protocol as api
from serving.admission import Busy
from serving.decoding import Ended, Piece
from serving.errors import ApiError, failed, overloaded
from serving.openai_answers import Answer, Written

log = logging.getLogger("ray.serve")


async def answered(handle: Callable[[], Awaitable[Any]]) -> Response:
    """The answer, or the error in OpenAI's shape."""
    try:
        answer = await handle()
    except Exception as error:
        return failed(as_api_error(error))
    if isinstance(answer, Response):
        return answer
    if isinstance(answer, dict):
        return JSONResponse(answer)
    return Response(answer.model_dump_json(), media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """This is the one place that takes every error: a failed request must not be more to its client than a failed
    request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextOverflow):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, Busy):
        metrics.refused("busy")
        return overloaded(error.retry_after)
    if isinstance(error, RayActorError | DeploymentUnavailableError | BackPressureError | EngineDied):
        message = "an engine of this policy is not available just now; try again"
        return ApiError(503, message, kind="server_error", code="engine_unavailable")
    log.error("a request failed", exc_info=error)
    cause = error.cause if isinstance(error, RayTaskError) else error
    message = f"internal error: {type(cause).__name__}: {one_line(cause)}"
    return ApiError(500, message, kind="server_error", code="internal_error")


@dataclass(frozen=True)
class Job:
    """A request that is understood and fits: its choices are yet to be decoded."""

    answer: Answer
    choices: list[AsyncGenerator[Piece | Ended]]
    top: int | None

    def pieces(self) -> AsyncGenerator[Piece | Ended]:
        """Of all choices, as they come."""
        return decoding.merged(self.choices)

    async def gathered(self) -> list[Written]:
        written = [Written() for _ in self.choices]
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                written[piece.choice].add(piece)
        return written


async def chunks(job: Job, form: answers.Streaming, options: api.StreamOptions | None) -> AsyncGenerator[str]:
    """The choices of a completion as server-sent events."""
    written = [Written() for _ in job.choices]
    before = [0] * len(written)  # characters of each choice's tokens with log-probabilities
    async with aclosing(job.pieces()) as pieces:
        begun = False
        async for piece in pieces:
            if not begun:
                begun = True
                for number in range(len(written)):
                    yield answers.event(form.chunk(job.answer, number, job.top, None))
            written[piece.choice].add(piece)
            if isinstance(piece, Ended):
                yield answers.event(form.chunk(job.answer, piece.choice, job.top, written[piece.choice].reason))
            elif piece.text or piece.logprobs or job.answer.shown(piece):
                yield answers.event(form.chunk(job.answer, piece.choice, job.top, piece, before[piece.choice]))
                before[piece.choice] += sum(len(job.answer.word(step.token)) for step in piece.logprobs)
    if options is not None and options.include_usage:
        yield answers.event(form.usage(job.answer, written))
    yield answers.DONE


async def streamed(events: AsyncGenerator[str]) -> StreamingResponse:
    """The events as a response, which begins with the first of them: what fails before it is answered as an error,
    what fails later is the last event."""
    first = await anext(events)

    async def body() -> AsyncGenerator[str]:
        yield first
        try:
            async with aclosing(events):
                async for event in events:
                    yield event
        except Exception as error:
            yield answers.event(as_api_error(error).body())
            yield answers.DONE

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
