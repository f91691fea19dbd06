"""The one kind of error that users are meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something that cannot be done as asked. The message is one line: what is wrong, where, and what to do. Commands print
    it and exit with status 2; nothing computed before it is lost."""
