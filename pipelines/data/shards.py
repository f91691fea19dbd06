"""Shards: Arrow IPC files, one row a trajectory, in the `shards` folder of a collection, which may lie in an object
store.

Reading refuses anything that is not a whole, uniform collection: a selector trained on half of one, or on two
pairs mixed, would be wrong without a sign of it. This module knows nothing of Ray, models or what the rows
are used for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipelines.data.layout import COLLECTED, RECORD, SHARDS
from pipelines.data.schema import METADATA, SHARD, VERSION
from pipelines.data.seal import Damaged, read_sealed, seal_of, sealed
from s2t_models.errors import UserError
from s2t_models.node_cache import fetched, sha256_of
from s2t_models.recipe import Recipe
from s2t_models.storage import TRANSFERS, Location, location, whole


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
        recipe.divergence.on_texts_of(recipe.collect.writer),
        str(recipe.collect.k),
        str(recipe.collect.steps),
        task,
    )
    return dict(zip(METADATA, values, strict=True))


def write_shard(path: Location, table: pa.Table, metadata: dict[str, str]) -> str:
    """Write one shard whole or not at all, with its checksum; returns the sha256 of the file."""
    with whole(path) as part:
        part.write_bytes(sealed(table.cast(SHARD), metadata))
        return sha256_of(part)


def read_shards(collection: str | Location) -> tuple[pa.Table, dict[str, str]]:
    """All rows of a collection, in the order of its prompts, and the metadata its shards share. Files are
    memory-mapped; of an object store they are fetched once a node.

    Raises ShardError: no such folder, a collection that is not finished, a file that is not a shard or is not what was
    written, another version, shards of different pairs or recipes, a row that occurs twice.
    """
    tables = list(each_shard(collection, mapped=True))
    rows = pa.concat_tables(tables)
    uids = rows["uid"].to_pylist()
    if len(set(uids)) < len(uids):
        twice = next(uid for uid in uids if uids.count(uid) > 1)
        raise ShardError(f"{collection}: row {twice} occurs twice; delete {collection} and collect again")
    return rows, metadata_of(tables[0])


def read_metadata(collection: str | Location) -> dict[str, str]:
    """The metadata of a collection, from its first shard alone. Raises ShardError as `read_shards` does."""
    return metadata_of(_read(shard_paths(collection)[0]))


def each_shard(collection: str | Location, mapped: bool = False, check: bool = True) -> Iterator[pa.Table]:
    """The tables of a collection, one shard at a time; see `read_shards`. `mapped` ones take no memory: of an object
    store they are fetched first. Checksums are checked unless that was done before: it reads all of a file."""
    paths = shard_paths(collection)
    if mapped:
        folder = fetched(paths[0].parent)
        paths = [folder / path.name for path in paths]
    first: dict[str, str] = {}
    for path in paths:
        table = _read(path, check)
        first = first or metadata_of(table)
        _refuse_mixture(first, paths[0], metadata_of(table), path)
        yield table


def shard_paths(collection: str | Location) -> list[Location]:
    """A collection's files in their order. Raises ShardError where it is not there, not finished or not whole."""
    collection = location(collection)
    folder = collection / SHARDS
    unfinished = (collection / RECORD).is_file() and not (collection / COLLECTED).is_file()
    if unfinished:
        raise ShardError(f"{collection}: the collection is not finished; run the same collect command again")
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; make it with: python -m pipelines.collect --output {collection}")
    paths: list[Location] = sorted(folder.glob("*.arrow"))
    if not paths:
        raise ShardError(f"{folder}: holds no shards; delete {collection} and collect again")
    _refuse_gaps(paths)
    return paths


def shards_digest(collection: Location) -> str:
    """What a collection is known by: the sha256 of the checksums that its shards carry, in their order. Only their
    footers are read."""
    paths = shard_paths(collection)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        return hashlib.sha256("".join(pool.map(_seal_of, paths)).encode()).hexdigest()


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


def _seal_of(path: Location) -> str:
    try:
        return seal_of(path)
    except Damaged as error:
        raise ShardError(_not_whole(path, error)) from None


def _not_whole(path: Location, error: Damaged) -> str:
    return f"{path}: not a whole shard: {error}; restore the file or collect again"


def _read(path: Location, check: bool = True) -> pa.Table:
    try:
        table = read_sealed(path, check)
    except Damaged as error:
        raise ShardError(_not_whole(path, error)) from None
    version = metadata_of(table).get("s2t.version")
    if version is None:
        raise ShardError(f"{path}: an Arrow file, but not a shard of this project")
    if version != VERSION:
        raise ShardError(f"{path}: a shard of version {version}, and this code reads version {VERSION}; collect again")
    if not table.schema.equals(SHARD, check_metadata=False) or set(METADATA) - set(metadata_of(table)):
        raise ShardError(f"{path}: the columns are not those of a shard of version {VERSION}; collect again")
    return table


def metadata_of(table: pa.Table) -> dict[str, str]:
    """What a shard's schema carries."""
    return {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}


def _refuse_mixture(first: dict[str, str], first_path: Location, other: dict[str, str], path: Location) -> None:
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


def _refuse_gaps(paths: list[Location]) -> None:
    count = int(paths[0].stem.rpartition("-")[2]) if paths[0].stem.rpartition("-")[2].isdigit() else len(paths)
    names = {path.name for path in paths}
    lost = [shard_name(i, count) for i in range(count) if shard_name(i, count) not in names]
    if lost or len(paths) != count:
        what = f"{lost[0]} is missing" if lost else f"there are {len(paths)} files where {count} belong"
        raise ShardError(f"{paths[0].parent}: {what}; restore the file or collect again")
