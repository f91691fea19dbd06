"""Keeping training, calibration and test rows apart.

A row is known by the hashes of its question and of what the user says in its prompt, with case and spacing evened out,
so the same problem is found under another identifier, in another prompt, and in a file of prompts.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import combinations

from pipelines.tasks.base import Item


def text_hash(text: str) -> str:
    """SHA-256 of the text, normalised (NFKC), lower-cased, every run of spaces as one."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def question_hashes(messages: Iterable[Mapping[str, str]], question: str | None = None) -> list[str]:
    """What a prompt is known by: the hashes of its users' messages, and of the bare question where that is known."""
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return sorted({text_hash(text) for text in [*texts, *([question] if question else [])] if text.strip()})


def fingerprint(items: Iterable[Item]) -> dict[str, str]:
    """The `question_hashes` of each row, with the row's uid."""
    return {key: item.uid for item in items for key in question_hashes(item.prompt, item.question)}


def refuse_overlap(sets: Mapping[str, Mapping[str, str] | Iterable[str]]) -> None:
    """Raises ValueError where two of the sets (name to hashes, or to a `fingerprint`) share a row; it names the sets
    and some rows."""
    hashes = {name: set(rows) for name, rows in sets.items()}
    for first, second in combinations(hashes, 2):
        shared = sorted(hashes[first] & hashes[second])
        if shared:
            rows = sets[second]
            named = [rows[key] if isinstance(rows, Mapping) else key[:16] for key in shared[:5]]
            more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
            raise ValueError(
                f"{first} and {second} share {len(shared)} row{'s' * (len(shared) > 1)}: {', '.join(named)}{more}; "
                "choose splits that do not overlap"
            )
