"""Shards: Arrow IPC files, one row a trajectory, in the `shards` folder of a collection.

Reading refuses anything that is not a whole, uniform collection: a selector trained on half of one, or on two
pairs mixed, would be wrong without a sign of it. This module knows nothing of Ray, models or what the rows
are used for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

from pipelines.data.layout import RECORD, SHARDS
from pipelines.data.schema import METADATA, SHARD, VERSION
from s2t_models.errors import UserError
from s2t_models.recipe import Recipe
from s2t_models.storage import whole


class ShardError(UserError):
    """Shards that cannot be used; the message is one line that says which file and what to do."""


def shard_metadata(recipe: Recipe, slm: str, teacher: str, tokenizer: str, task: str) -> dict[str, str]:
    """What a shard's schema carries. `slm`, `teacher` and `tokenizer` are sha256 of the files."""
    values = (
        VERSION,
        recipe.model_dump_json(),
        slm,
        teacher,
        tokenizer,
        str(recipe.divergence),
        str(recipe.collect.k),
        str(recipe.collect.steps),
        task,
    )
    return dict(zip(METADATA, values, strict=True))


def write_shard(path: Path, table: pa.Table, metadata: dict[str, str]) -> None:
    """Write one shard whole or not at all."""
    schema = SHARD.with_metadata(metadata)
    with whole(path) as part, pa.ipc.new_file(part, schema) as writer:
        writer.write_table(table.cast(schema))


def read_shards(collection: str | Path) -> tuple[pa.Table, dict[str, str]]:
    """All rows of a collection, in the order of its prompts, and the metadata its shards share. Files are
    memory-mapped.

    Raises ShardError: no such folder, a collection that is not finished, a file that is not a shard, another
    version, shards of different pairs or recipes, a row that occurs twice.
    """
    collection = Path(collection)
    folder = collection / SHARDS
    if not folder.is_dir():
        if (collection / RECORD).is_file():
            raise ShardError(f"{collection}: the collection is not finished; run the same collect command again")
        raise ShardError(f"{folder}: no such folder; make it with: python -m pipelines.collect --output {collection}")
    paths = sorted(folder.iterdir())
    if not paths:
        raise ShardError(f"{folder}: holds no shards; delete {collection} and collect again")
    tables = [_read(path) for path in paths]
    metadata = _metadata(tables[0])
    for path, table in zip(paths, tables, strict=True):
        _refuse_mixture(metadata, paths[0], _metadata(table), path)
    _refuse_gaps(paths)
    rows = pa.concat_tables(tables)
    uids = rows["uid"].to_pylist()
    if len(set(uids)) < len(uids):
        twice = next(uid for uid in uids if uids.count(uid) > 1)
        raise ShardError(f"{folder}: row {twice} occurs twice; delete {collection} and collect again")
    return rows, metadata


def shards_digest(collection: Path) -> str:
    """The sha256 of a collection's shard files, which is what a collection is known by."""
    digest = hashlib.sha256()
    for path in sorted((collection / SHARDS).iterdir()):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def questions(table: pa.Table) -> list[str]:
    """The hashes that the prompts of all rows are known by (`splits.question_hashes`)."""
    return sorted(set(table["questions"].combine_chunks().flatten().to_pylist()))


def check_pair(metadata: dict[str, str], slm: str, teacher: str, tokenizer: str) -> None:
    """Refuse shards of another model pair. Raises ShardError naming what differs."""
    now = {"s2t.slm": slm, "s2t.teacher": teacher, "s2t.tokenizer": tokenizer}
    wrong = [key.removeprefix("s2t.") for key, value in now.items() if metadata[key] != value]
    if wrong:
        raise ShardError(
            f"the shards are of another pair: not the recipe's {', '.join(wrong)}; "
            "use that pair's recipe or collect again"
        )


def shard_name(index: int, count: int) -> str:
    """The name says how many there are, so that a lost file is noticed."""
    return f"{index:05d}-of-{count:05d}.arrow"


def _read(path: Path) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{path}: not a shard (an Arrow IPC file): {' '.join(str(error).split())}") from None
    version = _metadata(table).get("s2t.version")
    if version is None:
        raise ShardError(f"{path}: an Arrow file, but not a shard of this project")
    if version != VERSION:
        raise ShardError(f"{path}: a shard of version {version}, and this code reads version {VERSION}; collect again")
    if not table.schema.equals(SHARD, check_metadata=False) or set(METADATA) - set(_metadata(table)):
        raise ShardError(f"{path}: the columns are not those of a shard of version {VERSION}; collect again")
    return table


def _metadata(table: pa.Table) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _refuse_mixture(first: dict[str, str], first_path: Path, other: dict[str, str], path: Path) -> None:
    if any(first[key] != other[key] for key in ("s2t.slm", "s2t.teacher", "s2t.tokenizer")):
        raise ShardError(
            f"{path}: of another model pair than {first_path.name}; keep each collection in its own folder"
        )
    different = [key.removeprefix("s2t.") for key in METADATA if first[key] != other[key]]
    if different:
        raise ShardError(
            f"{path}: collected with other settings than {first_path.name} ({', '.join(different)}); "
            "keep each collection in its own folder"
        )


def _refuse_gaps(paths: list[Path]) -> None:
    count = int(paths[0].stem.rpartition("-")[2]) if paths[0].stem.rpartition("-")[2].isdigit() else len(paths)
    names = {path.name for path in paths}
    lost = [shard_name(i, count) for i in range(count) if shard_name(i, count) not in names]
    if lost or len(paths) != count:
        what = f"{lost[0]} is missing" if lost else f"there are {len(paths)} files where {count} belong"
        raise ShardError(f"{paths[0].parent}: {what}; restore the file or collect again")
