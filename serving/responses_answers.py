"""The answers of OpenAI's Responses API, text only: one message, whole or as its events."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from serving.decoding import Ended, Piece
from serving.openai_answers import Answer, Written


def response(answer: Answer, written: Written) -> dict[str, Any]:
    """The response object; in progress where the answer has not ended."""
    ended = written.ended is not None
    complete = ended and written.reason == "stop"
    usage = answer.usage([written])
    return {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": answer.created,
        "status": "completed" if complete else "incomplete" if ended else "in_progress",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if ended and not complete else None,
        "instructions": None,
        "metadata": {},
        "model": answer.model,
        "output": [_message(answer, written)] if ended else [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "text": {"format": {"type": "text"}},
        "tool_choice": "none",
        "tools": [],
        "truncation": "disabled",
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        if ended
        else None,
        "s2t": answer.s2t([written]).model_dump(exclude_none=True),
    }


def _message(answer: Answer, written: Written) -> dict[str, Any]:
    status = "in_progress" if written.ended is None else "completed" if written.reason == "stop" else "incomplete"
    content = [] if written.ended is None else [_part(written.text)]
    return {"id": _name(answer), "type": "message", "role": "assistant", "status": status, "content": content}


def _name(answer: Answer) -> str:
    return f"msg_{answer.id}"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def events(answer: Answer, pieces: AsyncGenerator[Piece | Ended]) -> AsyncGenerator[str]:
    """The response's events, beginning with the answer's first piece. With decisions asked for, each part of the text
    carries its `s2t`."""
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        data = {"type": f"response.{kind}", "sequence_number": next(numbers), **fields}
        return f"event: response.{kind}\ndata: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"

    written, begun = Written(), False
    place = {"item_id": _name(answer), "output_index": 0, "content_index": 0}
    async with aclosing(pieces):
        async for piece in pieces:
            if not begun:
                begun = True
                yield event("created", response=response(answer, written))
                yield event("in_progress", response=response(answer, written))
                yield event("output_item.added", output_index=0, item=_message(answer, written))
                yield event("content_part.added", **place, part=_part(""))
            written.add(piece)
            if isinstance(piece, Piece) and (piece.text or answer.shown(piece)):
                yield event("output_text.delta", **place, delta=piece.text, logprobs=[], **answer.shown(piece))
    yield event("output_text.done", **place, text=written.text, logprobs=[])
    yield event("content_part.done", **place, part=_part(written.text))
    yield event("output_item.done", output_index=0, item=_message(answer, written))
    whole = response(answer, written)
    yield event(whole["status"], response=whole)
