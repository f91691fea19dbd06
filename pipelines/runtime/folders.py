"""One job at a time in an output folder: two would undo or repeat each other's work."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_one(folder: Path, error: type[Exception]) -> Iterator[None]:
    """Hold the folder, making it where it is missing. Raises `error` where it cannot be made or another job holds it; the hold
    ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise error(f"{folder}: not a folder to write to: {problem.strerror}; choose another --output") from None
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"{folder}: another job is at work there; wait for it or choose another --output") from None
        yield
