"""Shards are read back as they were written, and anything else is refused with one line."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.layout import RECORD, SHARDS
from pipelines.data.schema import SHARD, VERSION
from pipelines.data.shards import (
    ShardError,
    check_pair,
    questions,
    read_shards,
    shard_metadata,
    shard_name,
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
    assert f"{path}: not a shard" in _refused(collection)


def test_truncated_shard_is_refused(collection: Path) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: not a shard" in _refused(collection)


def test_other_arrow_file_is_refused(collection: Path) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    table = pa.table({"uid": ["c"]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    assert "not a shard of this project" in _refused(collection)


def test_other_columns_are_refused(collection: Path, recipe: Recipe) -> None:
    path = collection / SHARDS / shard_name(1, 2)
    table = pa.table({"uid": ["c"]}).replace_schema_metadata(_metadata(recipe))
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
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
