"""Results with the teacher's view, kept as a file beside the results that they are of, so that it is asked once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.layout import RESULTS
from pipelines.results.summary import read_results
from s2t_models.storage import Location, whole

#: What `audit` made of the results, and what `read` did.
AUDITED, READ = "audited.parquet", "read.parquet"
#: In the metadata of such a file: the answers that it is of.
_ANSWERS_OF = "s2t.audited"


def is_kept(folder: Location, name: str) -> bool:
    """Whether the file `name` is there, of the answers that the folder holds now."""
    path = folder / name
    return path.is_file() and read_results(path)[1].get(_ANSWERS_OF) == _answers(read_results(folder / RESULTS)[0])


def keep(folder: Location, name: str, frame: pd.DataFrame, metadata: Mapping[str, str]) -> None:
    """Write the rows of the folder's results, with what the teacher said, whole or not at all."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**metadata, _ANSWERS_OF: _answers(frame)})
    with whole(folder / name) as part:
        pq.write_table(table, part)


def _answers(frame: pd.DataFrame) -> str:
    return hashlib.sha256("".join(sorted(frame["key"])).encode()).hexdigest()
