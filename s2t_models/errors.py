"""The one kind of error that users are meant to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something that cannot be done as asked. The message is one line: what is wrong, where, and what to do. Commands print
    it and exit with status 2; nothing computed before it is lost."""


def first_problem(error: ValidationError) -> str:
    """What is wrong with a file that pydantic refused, in one line: the first key and its problem."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{key}: {first['msg'].lower()}"
