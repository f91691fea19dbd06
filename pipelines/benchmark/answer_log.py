"""Questions, and the answers that are kept, so that none is paid for twice.

An answer is written and synced to `ANSWERS/*.jsonl` before it counts as answered; a job that was killed reads these
files and asks only the rest. What a judge said is kept in the same way.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from s2t_models.errors import UserError

#: A question is {"key", "model", "seed", "max_tokens", "messages": JSON, "turns": JSON list of later user texts,
#: "options": JSON list of a multiple choice's texts}.
Question = dict[str, Any]
#: An answer is {"key", "outputs": one text a turn, "finish", "s2t": extension or {}, "tokens", "seconds", "error",
#: "shortened": whether the context left less than `max_tokens`}.
Answer = dict[str, Any]


class AnswersError(UserError):
    """Kept answers that cannot be read."""


def read_answers(folder: Path) -> dict[str, Answer]:
    """Every answer kept in `folder`, by key. The torn last line of a killed writer is left out; anything else that is
    not an answer raises AnswersError, naming the file and line."""
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("*.jsonl")):
        *lines, torn = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
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


class AnswerCount:
    """How many answers have been added to a folder since this was made; each call reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {path: path.stat().st_size for path in folder.glob("*.jsonl")}
        self._count = 0

    def __call__(self) -> int:
        for path in self._folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            self._read[path] = self._read.get(path, 0) + len(new)
            self._count += new.count(b"\n")
        return self._count


class AnswerLog:
    """An append-only file of this process's own: an answer is on the disk when `append` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{uuid.uuid4().hex}.jsonl").open("ab", buffering=0)

    def append(self, answer: Answer) -> None:
        self.file.write(json.dumps(answer).encode() + b"\n")  # in ASCII: a lone surrogate is no UTF-8
        os.fsync(self.file.fileno())
