"""Where rows come from: files below a local folder, or the same rows at a pinned revision on the network.

Local folders are laid out as the local paths say (`gsm8k/test.jsonl`, ...). With a local folder nothing is downloaded.
A source knows the files' formats, not their fields.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: One row of a benchmark's file, its fields by name.
Record = dict[str, Any]


def read_rows(path: Path) -> list[Record]:
    """Rows of a .jsonl, .jsonl.gz, .json or .parquet file.

    Raises:
        ValueError: the file is malformed; the message names the file and the line.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Record] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.name.endswith(".json"):
        loaded = json.loads(data)
        if not isinstance(loaded, list):
            raise ValueError(f"{path}: expected a list of rows, found {type(loaded).__name__}")
        return loaded
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


@dataclass(frozen=True)
class Hub:
    """Files of a dataset repository on the Hugging Face hub at one commit."""

    dataset: str
    revision: str
    files: tuple[str, ...]

    def rows(self) -> list[Record]:
        from huggingface_hub import hf_hub_download

        paths = [
            hf_hub_download(repo_id=self.dataset, filename=name, revision=self.revision, repo_type="dataset")
            for name in self.files
        ]
        return [row for path in paths for row in read_rows(Path(path))]


@dataclass(frozen=True)
class Pinned:
    """A file whose authors publish it in a git repository, at one commit, with its SHA-256."""

    url: str
    sha256: str

    def rows(self) -> list[Record]:
        """Raises ValueError where the file's hash is another."""
        with urllib.request.urlopen(self.url, timeout=60) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError(f"{self.url}: SHA-256 is {hashlib.sha256(data).hexdigest()}, expected {self.sha256}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / self.url.rsplit("/", 1)[1]
            path.write_bytes(data)
            return read_rows(path)


@dataclass(frozen=True)
class Source:
    """One table of rows: a path below the local folder, and the place on the network for when no folder is given."""

    local: str
    remote: Hub | Pinned | None = None

    def rows(self, data_dir: Path | None) -> list[Record]:
        """Raises FileNotFoundError where `data_dir` lacks the file."""
        if data_dir is None:
            if self.remote is None:
                raise FileNotFoundError(
                    f"{self.local} is published nowhere that can be pinned; give a folder that holds it with --data"
                )
            return self.remote.rows()
        path = data_dir / self.local
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: --data must name a folder that holds {self.local}")
        return read_rows(path)


def required(rows: Sequence[Record], fields: Sequence[str], source: Source) -> Sequence[Record]:
    """The rows, checked. Raises ValueError for the first one that lacks a field."""
    for number, row in enumerate(rows, start=1):
        missing = [name for name in fields if name not in row]
        if missing:
            raise ValueError(f"{source.local}, row {number}: no field {missing[0]!r}; it has {', '.join(row)}")
    return rows
