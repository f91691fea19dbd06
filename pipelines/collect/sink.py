"""The Arrow IPC sink of Ray Data. As a file sink it takes part in Ray Data's two-phase commit: a write is
announced in the checkpoint folder, made, and then committed there, so that a file counts only once its commit
is on record."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from pipelines.collect.schemas import LABELLED
from pipelines.data.seal import open_arrow, sealed
from s2t_models.storage import Location, ObjectPath


class ArrowSink(BlockBasedFileDatasink):
    """Writes each block as one Arrow IPC file of labelled rows, with its checksum."""

    def __init__(self, folder: Location) -> None:
        super().__init__(str(folder), file_format="arrow", try_create_dir=False, **filesystem_of(folder))

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        # In one piece: a file of an object store that is closed half-written would be there, half.
        file.write(sealed(block.to_arrow().select(LABELLED.names).cast(LABELLED)))


def filesystem_of(place: Location) -> dict[str, Any]:
    """The argument `filesystem` of Ray Data for what lies in an object store."""
    return {"filesystem": place.file_system} if isinstance(place, ObjectPath) else {}


def committed(folder: Location, checkpoint: Location) -> list[Location]:
    """The files of `folder` whose writing was committed. What a killed write left behind is not among
    them."""
    records = sorted(path for path in checkpoint.glob("*.parquet") if not path.stem.endswith(".pending"))
    return [folder / f"{path.stem}.arrow" for path in records]


def take_back(path: Location, checkpoint: Location) -> None:
    """A file's commit, and the file: its rows are made again."""
    (checkpoint / f"{path.stem}.parquet").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


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
