"""Who may ask: named keys, which only their holders know.

Keys come from a file (`serving.keys_file`, a line `name: key` each) or from S2T_API_KEYS ("name=key,..."), where
`s2t serve` runs. From there on only their sha256 travels, so that no key is in a recipe, a log or Ray's store.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from s2t_models.errors import UserError

VARIABLE = "S2T_API_KEYS"
SHORTEST = 16
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(rf"[!-~]{{{SHORTEST},}}")


class KeysError(UserError):
    """Keys that cannot be read; the message is one line and holds no key."""


@dataclass(frozen=True)
class Keys:
    """Names and the sha256 of their keys. Without any, everyone may ask."""

    digests: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        return bool(self.digests)

    def owner(self, key: str) -> str | None:
        """The name that the key belongs to, None where it is nobody's. Takes as long whichever it is."""
        digest, found = _digest(key), None
        for name, known in self.digests:
            if hmac.compare_digest(digest, known):
                found = name
        return found


def read_keys(file: str | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """The keys of the file and of the environment. Raises KeysError where one of them is none."""
    found: dict[str, bytes] = {}
    for where, name, key in [*_of_file(file), *_of_environment(environment.get(VARIABLE, ""))]:
        if not _NAME.fullmatch(name):
            raise KeysError(
                f"{where}: a key has a name before it, of 1 to 64 letters, digits, dots, dashes and underscores"
            )
        if not _KEY.fullmatch(key):
            raise KeysError(
                f"{where}: the key of {name} has to have {SHORTEST} or more printable ASCII characters, no spaces"
            )
        if name in found:
            raise KeysError(f"{where}: there are two keys of {name}")
        found[name] = _digest(key)
    return Keys(tuple(found.items()))


def new_key(name: str) -> tuple[Keys, str]:
    """A key made here and now, and what knows it: for a job that asks an endpoint of its own."""
    key = secrets.token_urlsafe(32)
    return Keys(((name, _digest(key)),)), key


def is_readable_by_others(file: str) -> bool:
    """Whether other users of the machine can read the file."""
    return bool(Path(file).stat().st_mode & 0o077)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _of_file(file: str | None) -> Iterator[tuple[str, str, str]]:
    if file is None:
        return
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise KeysError(f"serving.keys_file: {file} cannot be read ({reason})") from None
    for number, line in enumerate(lines, 1):
        if (text := line.strip()) and not text.startswith("#"):
            yield f"{file}, line {number}", *_parted(text, ":")


def _of_environment(text: str) -> Iterator[tuple[str, str, str]]:
    for number, part in enumerate(filter(None, text.split(",")), 1):
        yield f"{VARIABLE}, key {number}", *_parted(part, "=")


def _parted(text: str, sign: str) -> tuple[str, str]:
    """Name and key. Without the sign it is no name, but perhaps a key, which must not be shown as one."""
    name, found, key = text.partition(sign)
    return (name.strip(), key.strip()) if found else ("", "")
