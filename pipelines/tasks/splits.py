"""Keeping training, calibration and test rows apart.

A row is known by the hash of its question's text with case and spacing evened out, so the same problem is found under another identifier or prompt.
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


def fingerprint(items: Iterable[Item]) -> dict[str, str]:
    """Hash of each row's question, with the row's uid."""
    return {text_hash(item.question): item.uid for item in items}


def refuse_overlap(sets: Mapping[str, Mapping[str, str] | Iterable[str]]) -> None:
    """Raises ValueError where two of the sets (name to hashes, or to a `fingerprint`) share a row; it names the sets and some rows."""
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
