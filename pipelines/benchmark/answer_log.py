"""Questions, and the answers that are kept, so that none is paid for twice.

An answer is written to the log `ANSWERS` (`runtime.records`) before it counts as answered; a job that was killed reads
it and asks only the rest. What a judge said is kept in the same way.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from typing import Any

from pipelines.runtime.records import PATTERN, contents
from s2t_models.errors import UserError
from s2t_models.storage import Location

#: A question is {"key", "model", "seed", "max_tokens", "messages": JSON, "turns": JSON list of later user texts,
#: "options": JSON list of a multiple choice's texts}.
Question = dict[str, Any]
#: An answer is {"key", "outputs": one text a turn, "finish", "s2t": extension or {}, "tokens", "seconds", "error",
#: "shortened": whether the context left less than `max_tokens`}.
Answer = dict[str, Any]


class AnswersError(UserError):
    """Kept answers that cannot be read."""


def read_answers(folder: Location) -> dict[str, Answer]:
    """Every answer kept in `folder`, by key. The torn last line of a killed writer is left out; anything else that is
    not an answer raises AnswersError, naming the file and line."""
    answers: dict[str, Answer] = {}
    paths: list[Location] = sorted(folder.glob(PATTERN))
    for path, content in contents(paths):
        *lines, torn = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                answers.setdefault(answer["key"], answer)
            except (ValueError, KeyError, TypeError, RecursionError):
                raise AnswersError(
                    f"{path}:{number}: not an answer; delete that line to ask its question again"
                ) from None
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            answer = json.loads(torn)
            answers.setdefault(answer["key"], answer)
    return answers
