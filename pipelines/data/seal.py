"""Arrow IPC files that hold their own checksum, so that one with a torn end or a changed byte is never read as another.

The schema metadata holds the sha256 of the file, taken with a blank of the same length in its place. It stands in the
file twice: before all rows, and in the footer behind them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import pyarrow as pa

from s2t_models.errors import one_line
from s2t_models.storage import Location, ObjectPath

_KEY = b"s2t.sha256"
_BLANK = b"the sha256 of this file, with these words in its place".ljust(64, b".")


class Damaged(ValueError):
    """A file that is not what was written; the message says in what way."""


def sealed(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """The table as an Arrow IPC file, with `metadata` in its schema."""
    values = {key.encode(): value.encode() for key, value in (metadata or {}).items()}
    schema = table.schema.with_metadata(values | {_KEY: _BLANK})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table.cast(schema))
    content = sink.getvalue()
    seal = _digest(content, _BLANK).encode()
    return seal.join(_around(content, _BLANK))


def open_arrow(path: Location) -> pa.NativeFile:
    """A file as Arrow reads it: mapped into memory, or read whole from an object store."""
    return pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else pa.memory_map(str(path))


def seal_of(path: Location) -> str:
    """The checksum that a file carries, from its footer alone; not checked. Raises Damaged."""
    try:
        with path.open_file() if isinstance(path, ObjectPath) else open_arrow(path) as file:
            metadata = pa.ipc.open_file(file).schema.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"not an Arrow IPC file: {one_line(error)}") from None
    return _stated(metadata).decode(errors="replace")


def read_sealed(path: Location, check: bool = True) -> pa.Table:
    """The rows of a file, and its metadata but for the seal, which is checked unless that was done before. Raises
    Damaged."""
    try:
        content = open_arrow(path).read_buffer()
        table = pa.ipc.open_file(content).read_all()
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"not an Arrow IPC file: {one_line(error)}") from None
    metadata = dict(table.schema.metadata or {})
    seal = _stated(metadata)
    del metadata[_KEY]
    if check and _digest(content, seal) != seal.decode(errors="replace"):
        raise Damaged("its checksum is another: a part of it has changed")
    return table.replace_schema_metadata(metadata)


def _stated(metadata: Mapping[bytes, bytes]) -> bytes:
    if _KEY not in metadata:
        raise Damaged("an Arrow IPC file without a checksum")
    return metadata[_KEY]


def _digest(content: pa.Buffer, seal: bytes) -> str:
    digest = hashlib.sha256()
    for number, part in enumerate(_around(content, seal)):
        if number:
            digest.update(_BLANK)
        digest.update(part)
    return digest.hexdigest()


def _around(content: pa.Buffer, seal: bytes) -> list[memoryview]:
    """What stands before, between and behind the first and the last place of `seal`; rows between them may hold the
    same characters."""
    view = memoryview(content)
    places = [found.start() for found in re.finditer(re.escape(seal), view)]
    first, last = places[0], places[-1]
    return [view[:first], view[first + len(seal) : last], view[last + len(seal) :]]
