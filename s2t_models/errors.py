"""The errors that users are meant to read, and any error as one line."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


_NO_ROOM = ("no space left on device", "disk quota exceeded", "database or disk is full")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class UserError(Exception):
    """Something that cannot be done as asked. The message is one line: what is wrong, where, and what to do. Commands
    print it and exit with `status`; nothing computed before it is lost."""

    status = 2


class NothingDone(UserError):
    """A job that ran to its end and has nothing to show for it: every row failed. The message names the first
    reason."""

    status = 1


def one_line(error: BaseException | str, longest: int = 300) -> str:
    """What an error says, in one line of at most `longest` characters: the last line where the message holds a
    traceback (as Ray's do), the error's type where it says nothing. Terminal colours, which Ray adds, are left out."""
    text = _COLOUR.sub("", str(error)).strip()
    if "Traceback (most recent call last)" in text or text.startswith("ray::"):
        text = text.rsplit("\n", 1)[-1]
    return " ".join(text.split())[:longest] or (type(error).__name__ if isinstance(error, BaseException) else "")


def no_room(error: BaseException) -> str | None:
    """Where an error came of a full disk, here or in a process that Ray ran, the line that says so; else None."""
    known: set[int] = set()
    left = [error]
    while left:
        found = left.pop()
        known.add(id(found))
        lines = str(found).splitlines()
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return one_line(found)
        if line := next((line for line in lines if any(words in line.lower() for words in _NO_ROOM)), None):
            return one_line(line)
        # Ray's errors hold those of its tasks as `cause`, and those of a training's workers as `worker_failures`.
        held = [found.__cause__, getattr(found, "cause", None), *getattr(found, "worker_failures", {}).values()]
        left += [inner for inner in held if isinstance(inner, BaseException) and id(inner) not in known]
    return None


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file that pydantic refused, in one line: the first key and its problem."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{key}: {first['msg'].lower()}"
