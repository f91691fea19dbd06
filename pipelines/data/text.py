"""Text that any file can hold."""

from __future__ import annotations

import re

_SURROGATE = re.compile("[\ud800-\udfff]")


def file_stem(policy: str) -> str:
    """A policy's name as part of a file's: not every file system and store takes the colon of s2t-local:NAME."""
    return policy.replace(":", "_")


def encodable(text: str) -> str:
    """The text with U+FFFD for each lone surrogate: JSON can carry half a character (`\\ud83d`), UTF-8 and Parquet
    cannot."""
    return _SURROGATE.sub("\ufffd", text)
