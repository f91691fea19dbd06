"""Generation up to a delimiter in the text: a step of reasoning up to a blank line, a sentence up to its end.

The delimiter counts only behind some text, which an engine's stop texts cannot say. So the engine drafts chunks, and
the token that completes the delimiter cuts the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from s2t_models.engines.contract import Engine, Finish, Sampling, Usage

#: How a draft ends where the output does.
ENDED = ("end", "stop")


@dataclass(frozen=True)
class Segment:
    """`finish` is None where the delimiter ended it."""

    ids: list[int]
    finish: Finish | None
    usage: Usage


async def generate_segment(
    engine: Engine,
    prefix: list[int],
    sampling: Sampling,
    decode: Callable[[list[int]], str],
    delimiters: tuple[str, ...],
    chunk: int,
) -> Segment:
    """Decode until a delimiter follows some text, the end token, or `sampling.max_tokens`."""

    def complete(ids: list[int]) -> bool:
        text = decode(ids).lstrip()
        return any(delimiter in text for delimiter in delimiters)

    ids: list[int] = []
    usage = Usage()
    while len(ids) < sampling.max_tokens:
        budget = min(chunk, sampling.max_tokens - len(ids))
        asked = replace(sampling, max_tokens=budget, first_step=sampling.first_step + len(ids))
        draft = await engine.generate(prefix + ids, asked)
        usage += draft.usage
        known, ids = len(ids), ids + draft.ids
        if complete(ids):
            end = next(end for end in range(known + 1, len(ids) + 1) if complete(ids[:end]))
            ended = draft.finish in ENDED and end == len(ids)
            return Segment(ids[:end], draft.finish if ended else None, usage)
        if draft.finish in ENDED:
            return Segment(ids, draft.finish, usage)
    return Segment(ids, "length", usage)
