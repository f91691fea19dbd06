"""Shards are read back as they were written, and anything else is refused with one line."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.layout import RECORD, SHARDS
from pipelines.data.schema import SHARD, VERSION
from pipelines.data.seal import read_sealed, sealed
from pipelines.data.shards import (
    ShardError,
    check_pair,
    questions,
    read_shards,
    shard_metadata,
    shard_name,
    shard_paths,
    shards_digest,
    write_shard,
)
from s2t_models.recipe import Recipe, load_recipe

METADATA_KEYS = 9


def _row(uid: str) -> dict:
    step = {
        "step": 1,
        "by_kl": True,
        "candidates_K": [7, 8],
        "slm_logprobs_K": [-0.5, -1.0],
        "teacher_logprobs_K": [-2.0, -0.25],
    }
    return {
        "uid": uid,
        "questions": [f"hash of {uid}", "shared"],
        "prompt": "p",
        "prompt_ids": [1, 2],
        "output_ids": [7, 9],
        "seed": 5,
        "temperature": 0.7,
        "finish": "end",
        "teacher_read": 4,
        "kl_T": [0.0, 1.5],
        "entropy_T": [0.25, 0.5],
        "teacher_argmax_T": [7, 8],
        "teacher_rank_T": [0, 1],
        "kept": [step],
        "error": None,
    }  # fmt: skip


def _metadata(recipe: Recipe, slm: str = "s", k: int | None = None) -> dict[str, str]:
    metadata = shard_metadata(recipe, slm, "t", "tok", "embedded-train")
    return metadata | ({"s2t.k": str(k)} if k else {})


def _write(folder: Path, index: int, count: int, rows: list[dict], metadata: dict[str, str]) -> Path:
    (folder / SHARDS).mkdir(exist_ok=True)
    path = folder / SHARDS / shard_name(index, count)
    write_shard(path, pa.Table.from_pylist(rows, SHARD), metadata)
    return path


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


@pytest.fixture
def collection(tmp_path: Path, recipe: Recipe) -> Path:
    _write(tmp_path, 0, 2, [_row("a"), _row("b")], _metadata(recipe))
    _write(tmp_path, 1, 2, [_row("c")], _metadata(recipe))
    return tmp_path


def _refused(collection: Path) -> str:
    with pytest.raises(ShardError) as refusal:
        read_shards(collection)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_rows_and_metadata_come_back(collection: Path, recipe: Recipe) -> None:
    table, metadata = read_shards(collection)
    assert table.to_pylist() == [_row("a"), _row("b"), _row("c")]
    assert questions(table) == ["hash of a", "hash of b", "hash of c", "shared"]
    assert metadata == _metadata(recipe)
    assert len(metadata) == METADATA_KEYS
    assert Recipe.model_validate_json(metadata["s2t.recipe"]) == recipe


def test_missing_folder_says_how_to_make_it(tmp_path: Path) -> None:
    assert "pipelines.collect" in _refused(tmp_path / "nowhere")


def test_unfinished_collection_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")
    assert "not finished" in _refused(tmp_path)


def test_lost_shard_is_noticed(collection: Path) -> None:
    (collection / SHARDS / shard_name(0, 2)).unlink()
    assert f"{shard_name(0, 2)} is missing" in _refused(collection)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not Arrow at all", b"ARROW1\x00\x00cut off"])
def test_file_that_is_not_arrow_is_refused(collection: Path, content: bytes) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    path.write_bytes(content)
    assert f"{path}: not a whole shard: not an Arrow IPC file" in _refused(collection)


@pytest.mark.parametrize("point", range(50))
def test_a_torn_shard_and_one_with_a_changed_bit_are_refused(collection: Path, point: int) -> None:
    draw = random.Random(point)
    path = collection / SHARDS / shard_name(1, 2)
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if point % 2:
        del content[at:]
    else:
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    assert _refused(collection).startswith(f"{path}: not a whole shard: ")


def test_other_arrow_file_is_refused(collection: Path) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    table = pa.table({"uid": ["c"]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert "not a whole shard: an Arrow IPC file without a checksum" in _refused(collection)
    path.write_bytes(sealed(table))
    assert "not a shard of this project" in _refused(collection)


def test_other_columns_are_refused(collection: Path, recipe: Recipe) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    path.write_bytes(sealed(pa.table({"uid": ["c"]}), _metadata(recipe)))
    assert "columns" in _refused(collection)


def test_other_version_is_refused(collection: Path, recipe: Recipe) -> None:
    _write(collection, 1, 2, [_row("c")], _metadata(recipe) | {"s2t.version": "999"})
    message = _refused(collection)
    assert "version 999" in message
    assert f"reads version {VERSION}" in message


def test_shards_of_two_pairs_are_refused(collection: Path, recipe: Recipe) -> None:
    _write(collection, 1, 2, [_row("c")], _metadata(recipe, slm="another"))
    assert "another model pair" in _refused(collection)


def test_shards_of_two_recipes_are_refused(collection: Path, recipe: Recipe) -> None:
    _write(collection, 1, 2, [_row("c")], _metadata(recipe, k=3))
    assert "other settings" in _refused(collection)


def test_row_that_occurs_twice_is_refused(collection: Path, recipe: Recipe) -> None:
    _write(collection, 1, 2, [_row("a")], _metadata(recipe))
    assert "row a occurs twice" in _refused(collection)


def test_shards_of_another_pair_than_the_recipes_are_refused(collection: Path) -> None:
    _, metadata = read_shards(collection)
    check_pair(metadata, "s", "t", "tok")
    with pytest.raises(ShardError, match="another pair: not the recipe's teacher, tokenizer;"):
        check_pair(metadata, "s", "other", "other")


def test_the_checksum_goes_by_the_file_whatever_its_rows_hold(tmp_path: Path) -> None:
    """Also rows that hold what stands in a file while its checksum is not known yet."""
    blank = "the sha256 of this file, with these words in its place".ljust(64, ".")
    table = pa.table({"prompt": [blank, blank * 3], "number": [1, 2]})
    content = sealed(table, {"key": "value"})
    assert content.count(blank.encode()) == 4, "those of the rows are left as they are"
    (tmp_path / "a").write_bytes(content)
    read = read_sealed(tmp_path / "a")
    assert read.equals(table)
    assert read.schema.metadata == {b"key": b"value"}


def test_a_collection_is_known_by_its_rows_and_its_footers_say_which(collection: Path, recipe: Recipe) -> None:
    first = shards_digest(collection)
    shard = shard_paths(collection)[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    assert shards_digest(collection) == first, "the rows are not read"
    assert "a part of it has changed" in _refused(collection)
    _write(collection, 0, 2, [_row("other")], _metadata(recipe))
    assert shards_digest(collection) != first
    shard.write_bytes(content[:-100])
    with pytest.raises(ShardError, match="not a whole shard: not an Arrow IPC file"):
        shards_digest(collection)
