"""The Arrow IPC sink of Ray Data. As a file sink it takes part in Ray Data's two-phase commit: a write is
announced in the checkpoint folder, made, and then committed there, so that a file counts only once its commit
is on record."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from pipelines.data.schema import SHARD


class ArrowSink(BlockBasedFileDatasink):
    """Writes each block as one Arrow IPC file of shard rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), file_format="arrow")

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        table = block.to_arrow().select(SHARD.names).cast(SHARD)
        with pa.ipc.new_file(file, SHARD) as writer:
            writer.write_table(table)


def committed(folder: Path, checkpoint: Path) -> list[Path]:
    """The files of `folder` whose writing was committed. What a killed write left behind is not among
    them."""
    records = sorted(path for path in checkpoint.glob("*.parquet") if not path.stem.endswith(".pending"))
    return [folder / f"{path.stem}.arrow" for path in records]
