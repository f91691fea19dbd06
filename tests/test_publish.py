"""Publishing a collection: exact ranks from counts, and the same shards however many tasks make them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.publishing import labelled_files
from pipelines.collect import publish as publishing
from pipelines.collect import ranks
from pipelines.collect.publish import publish
from pipelines.data.layout import COLLECTED
from pipelines.data.seal import read_sealed, sealed
from pipelines.data.shards import ShardError, read_shards, shard_metadata, shards_digest
from pipelines.data.trajectories import ShardTrajectories
from pipelines.distil.inputs import check_inputs
from s2t_models.calibration import BUDGETS, calibrate
from s2t_models.errors import NothingDone
from s2t_models.loading import tokenizer_hash, weights_hash
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.storage import ObjectPath
from s2t_models.training.batches import trajectories

ROWS = 40


@pytest.fixture
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


@pytest.fixture
def files(tmp_path: Path, recipe: Recipe) -> list[Path]:
    return labelled_files(tmp_path / "labelled", ROWS, 30, recipe, rows_a_file=7)


def _publish(files: list[Path], output: Path, recipe: Recipe, **how: int) -> dict:
    output.mkdir()
    return publish(files, ROWS, output, shard_metadata(recipe, "s", "t", "tok", "file:p"), recipe, **how)


@pytest.mark.parametrize("parts", [1, 5])
def test_every_rank_is_found_exactly(parts: int) -> None:
    rng = np.random.default_rng(parts)
    values_S = np.concatenate([rng.lognormal(-3, 3, 400), -rng.random(50), np.zeros(60), [1.5] * 70]).astype(np.float32)
    rng.shuffle(values_S)
    split = np.array_split(values_S, parts)
    coarse_B = sum(ranks.coarse(part) for part in split)
    every = range(len(values_S))
    counted: ranks.Fine = {}
    for part in split:
        ranks.add(counted, ranks.fine(part, {ranks.bin_of(coarse_B, rank) for rank in every}))
    assert [ranks.value_of(coarse_B, counted, rank) for rank in every] == sorted(values_S.tolist())
    for share in BUDGETS:
        rank = ranks.threshold_rank(len(values_S), share)
        assert ranks.value_of(coarse_B, counted, rank) == calibrate(values_S, [share])[share]
    low, high, between = ranks.quantile_ranks(len(values_S), 0.9)
    ordered = np.sort(values_S).astype(float)
    assert ordered[low] + between * (ordered[high] - ordered[low]) == pytest.approx(np.quantile(ordered, 0.9))


def test_the_summary_is_that_of_all_rows(files: list[Path], recipe: Recipe, tmp_path: Path) -> None:
    summary = _publish(files, tmp_path / "out", recipe)
    table, _ = read_shards(tmp_path / "out")
    assert table["uid"].to_pylist() == [f"row {number}" for number in range(ROWS)]
    whole = [row for row in table.to_pylist() if row["error"] is None]
    kl_S, entropy_S, rank_S = (
        np.concatenate([row[name] for row in whole]) for name in ("kl_T", "entropy_T", "teacher_rank_T")
    )
    kl_S, entropy_S = kl_S.astype(np.float32), entropy_S.astype(np.float32)
    errors = [row["error"] for row in table.to_pylist() if row["error"]]
    assert summary["errors"] == {"failed": len(errors)}
    assert summary["first_error"] == errors[0]
    assert summary["steps"] == len(kl_S)
    assert summary["agreement"] == pytest.approx((rank_S == 0).mean())
    assert summary["least_kl"] == calibrate(kl_S, [recipe.collect.steps])[recipe.collect.steps]
    assert summary["kept_steps"] == sum(len(row["kept"]) for row in whole)
    top_S = kl_S >= calibrate(kl_S, [0.01])[0.01]
    assert summary["hit"] == {str(k): pytest.approx((rank_S[top_S] < k).mean()) for k in (1, 2, 4, 8)}
    for name, values_S in (("kl", kl_S), ("entropy", entropy_S)):
        quantiles = np.quantile(values_S.astype(float), publishing.QUANTILES)
        assert list(summary[f"{name}_quantiles"].values()) == pytest.approx(list(quantiles))
        thresholds = json.loads((tmp_path / "out" / "thresholds.json").read_text())[name]
        assert {float(budget): value for budget, value in thresholds.items()} == calibrate(values_S, BUDGETS)
    by_kl = sum(step["by_kl"] for row in whole for step in row["kept"])
    assert by_kl == (kl_S >= summary["least_kl"]).sum()
    assert summary["teacher_decode"] == 0
    assert summary["teacher_prefill"] == sum(len(row["prompt_ids"]) + len(row["output_ids"]) for row in whole)


def test_many_tasks_give_what_one_gives(
    ray_cluster: str, files: list[Path], recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _publish(files, tmp_path / "one", recipe, rows_a_shard=8)
    monkeypatch.setattr(publishing, "FILES_A_TASK", 2)
    monkeypatch.setattr(publishing, "AT_ONCE", 2)
    assert _publish(files, tmp_path / "many", recipe, rows_a_shard=8) == first
    one, many = ({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.*")} for name in ("one", "many"))
    assert len(one) == 5 + 2
    assert many == one


def test_a_collection_is_the_same_in_an_object_store(
    object_store: str, files: list[Path], recipe: Recipe, tmp_path: Path
) -> None:
    work, there = ObjectPath(object_store) / "labelled", ObjectPath(object_store) / "published"
    for path in files:
        (work / path.name).upload(path)
    pair = weights_hash(recipe.slm), weights_hash(recipe.teacher), tokenizer_hash(recipe.slm)
    metadata = shard_metadata(recipe, *pair, "file:p")
    (here := tmp_path / "out").mkdir()
    summaries = [
        publish(places, ROWS, output, metadata, recipe, rows_a_shard=16)
        for places, output in ((list(work.iterdir()), there), (files, here))
    ]
    assert summaries[0] == summaries[1]
    assert read_shards(there)[0].equals(read_shards(here)[0])
    assert shards_digest(there) == shards_digest(here)
    checked = [check_inputs(recipe, "selector", output, None, {}, {}) for output in (there, here)]
    assert checked[0] == checked[1]
    ours, theirs = ShardTrajectories(there), trajectories(read_shards(here)[0].to_pylist())
    assert len(ours) == len(theirs) < ROWS
    for one, other in zip(ours, theirs, strict=True):
        assert (one.uid, one.prompt, one.tree.prompt) == (other.uid, other.prompt, other.tree.prompt)
        for of in (lambda item: item, lambda item: item.tree):
            arrays = [value for value in vars(of(one)).items() if isinstance(value[1], np.ndarray)]
            assert len(arrays) >= 3
            for name, value in arrays:
                np.testing.assert_array_equal(value, getattr(of(other), name), strict=True)


def test_a_lost_row_and_nothing_but_errors_are_refused(files: list[Path], recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="7 of 40 rows are missing, the first that of prompt 1;"):
        _publish(files[1:], tmp_path / "lost", recipe)
    assert not (tmp_path / "lost" / COLLECTED).exists()
    for path in files:
        table = read_sealed(path)
        steps = {name: pa.nulls(len(table), table.schema.field(name).type) for name in ("kl_T", "entropy_T", "kept")}
        for name, nothing in {**steps, "error": pa.array(["failed: x"] * len(table))}.items():
            table = table.set_column(table.schema.get_field_index(name), name, nothing)
        path.write_bytes(sealed(table))
    with pytest.raises(
        NothingDone, match=r"all 40 rows errored, and there is nothing to publish .the first: failed: x"
    ):
        _publish(files, tmp_path / "none", recipe)
