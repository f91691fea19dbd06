"""Rows that Ray Data writes to Arrow IPC files and keeps a record of: a job that was killed goes on behind them.

As a file sink, `ArrowSink` takes part in Ray Data's two-phase commit: a write is announced in the checkpoint folder,
made, and then committed there, so that a file counts only once its commit is on record.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as parquet
import ray
from ray.data import Dataset
from ray.data.block import BlockAccessor
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink

from pipelines.data.seal import open_arrow, sealed
from s2t_models.errors import UserError
from s2t_models.storage import Location, ObjectPath, whole

#: The column that a row is known by.
ID = "uid"
#: How often files are damaged before a job gives up.
TRIES = 3

Result = TypeVar("Result")


class DamagedFiles(Exception):
    """Files that are not what was written, each with what is wrong."""

    def __init__(self, files: Sequence[tuple[Location, str]]) -> None:
        super().__init__(files)  # so that it comes back whole from a task of Ray
        self.files = list(files)

    def __str__(self) -> str:
        return f"{len(self.files)} damaged files"


class ArrowSink(BlockBasedFileDatasink):
    """Writes each block as one Arrow IPC file of rows of `schema`, with its checksum."""

    def __init__(self, folder: Location, schema: pa.Schema) -> None:
        super().__init__(str(folder), file_format="arrow", try_create_dir=False, **_filesystem_of(folder))
        self._schema = schema

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        # In one piece: a file of an object store that is closed half-written would be there, half.
        file.write(sealed(block.to_arrow().select(self._schema.names).cast(self._schema)))


#: What Ray Data takes beside the actors inside `on_record`: one CPU reads and writes, and one filters out what an
#: earlier run has done.
OWN_TASKS = ({"CPU": 1.0}, {"CPU": 1.0})


@contextmanager
def on_record(checkpoint: Location) -> Iterator[None]:
    """While the block runs, Ray Data leaves out the rows that `checkpoint` has as written, and records there those that
    it writes."""
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        ID,
        str(checkpoint),
        delete_checkpoint_on_success=False,
        override_filesystem=checkpoint.file_system if isinstance(checkpoint, ObjectPath) else None,
    )
    # Ray's newer reader starts a dozen processes to read the footers of what is one file.
    newer_reader, context.use_datasource_v2 = context.use_datasource_v2, False
    context.checkpoint_config.checkpoint_actor_memory_bytes = 64 * 1024**2
    context.checkpoint_config.checkpoint_actor_pool_max_size = 1
    try:
        yield
    finally:
        context.checkpoint_config, context.use_datasource_v2 = None, newer_reader


def rows_left(rows: pa.Table, path: Location, batch: int) -> Dataset:
    """The rows that are not on record yet, as blocks of `batch` rows: inside `on_record`. They are read from the file
    `path`, which is written here: Ray Data leaves out rows only as it reads."""
    with whole(path) as part:
        parquet.write_table(rows, part)
    dataset = ray.data.read_parquet(str(path), override_num_blocks=1, **_filesystem_of(path))
    # A block is written, committed, and at most lost where something is killed, as one.
    return dataset.repartition(target_num_rows_per_block=batch)


def committed(folder: Location, checkpoint: Location) -> list[Location]:
    """The files of `folder` whose writing was committed. What a killed write left behind is not among
    them."""
    records = sorted(path for path in checkpoint.glob("*.parquet") if not path.stem.endswith(".pending"))
    return [folder / f"{path.stem}.arrow" for path in records]


class CommittedRows:
    """How many rows of a folder are committed; each call reads only the records that are new."""

    def __init__(self, folder: Location, checkpoint: Location) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self._rows: dict[str, int] = {}

    def __call__(self) -> int:
        for path in committed(self._folder, self._checkpoint):
            if path.stem not in self._rows:
                record = open_arrow(self._checkpoint / f"{path.stem}.parquet")
                self._rows[path.stem] = parquet.read_metadata(record).num_rows
        return sum(self._rows.values())


def take_back(path: Location, checkpoint: Location) -> None:
    """A file's commit, and the file: its rows are made again."""
    (checkpoint / f"{path.stem}.parquet").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def with_whole_files(
    job: str, checkpoint: Location, work: Callable[[], Result], error: Callable[[str], UserError]
) -> Result:
    """What `work` returns; where it raises DamagedFiles, these are named and taken back, and it is done again. Raises
    `error` with one line where files are damaged TRIES times."""
    for left in reversed(range(TRIES)):
        try:
            return work()
        except DamagedFiles as damaged:
            for path, reason in damaged.files:
                print(f"{job}: {path}: {reason}; its rows are made again", file=sys.stderr)
                take_back(path, checkpoint)
            if not left:
                path, reason = damaged.files[0]
                raise error(f"{path}: {reason}, for the {TRIES}th time; see to the disk") from None
    raise AssertionError("a try returns or raises")


def _filesystem_of(place: Location) -> dict[str, Any]:
    """The argument `filesystem` of Ray Data for what lies in an object store."""
    return {"filesystem": place.file_system} if isinstance(place, ObjectPath) else {}
