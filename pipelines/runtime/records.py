"""Records that several processes append to a folder, and others follow: JSON, one a line.

On a file system each writer has a file of its own. An object store has no appending, so there each record is an object.
Names begin with the time of writing, so that their order is that of the records of one writer. A record is kept when
`append` returns.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from s2t_models.storage import Location, ObjectPath

Record = dict[str, Any]
PATTERN = "*.jsonl"
#: Objects that are read at once.
_READS = 32


class RecordLog:
    """Appends to `folder`, for one process; any of its threads may."""

    def __init__(self, folder: Location) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self._file = None if isinstance(folder, ObjectPath) else (folder / _new_name()).open("ab", buffering=0)

    def append(self, record: Record) -> None:
        """Keep a record. Raises OSError or StorageError, and then nothing of it is there."""
        line = json.dumps(record).encode() + b"\n"  # in ASCII: a lone surrogate is no UTF-8
        if self._file is None:
            (self._folder / _new_name()).write_bytes(line)  # type: ignore[union-attr]
            return
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            try:
                if self._file.write(line) != len(line):  # a disk that fills up takes a part of it
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
                os.fsync(self._file.fileno())
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise


class NewLines:
    """The lines that have been added to a folder since the last call; before the first, all of them. With `from_now`,
    those from when this was made."""

    def __init__(self, folder: Location, from_now: bool = False) -> None:
        self._folder = folder
        self._read: dict[str, int] = {}
        if from_now:
            self._read = {path.name: _size(path) for path in folder.glob(PATTERN)}

    def __call__(self) -> list[bytes]:
        if isinstance(self._folder, ObjectPath):
            new = [path for path in self._folder.glob(PATTERN) if path.name not in self._read]
            self._read |= {path.name: 0 for path in new}
            return [line for _, content in contents(new) for line in content.splitlines()]
        return [line for path in sorted(self._folder.glob(PATTERN)) for line in self._added(path)]

    def _added(self, path: Path) -> list[bytes]:
        with path.open("rb") as file:
            file.seek(self._read.get(path.name, 0))
            *lines, torn = file.read().split(b"\n")
            self._read[path.name] = file.tell() - len(torn)
        return lines

    def count(self) -> int:
        """How many lines that were: of objects, without reading them."""
        if not isinstance(self._folder, ObjectPath):
            return len(self())
        new = [path.name for path in self._folder.glob(PATTERN) if path.name not in self._read]
        self._read |= dict.fromkeys(new, 0)
        return len(new)


def contents(paths: Sequence[Location]) -> Iterator[tuple[Location, bytes]]:
    """Files with what is in them; several are read at once, because a store takes its time for each."""
    with ThreadPoolExecutor(_READS) as pool:
        yield from zip(paths, pool.map(lambda path: path.read_bytes(), paths), strict=True)


def _new_name() -> str:
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.jsonl"


def _size(path: Location) -> int:
    return path.stat().st_size if isinstance(path, Path) else 0
