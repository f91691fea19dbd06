"""What the laboratory would call a loss: each stage's comparison finds a row that is missing and one that differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipelines.data.layout import COLLECTED, RESULTS, SHARDS
from pipelines.data.seal import open_arrow, sealed
from pipelines.distil.curves import CURVES, Curves
from pipelines.distil.inputs import training_folder

from .stages import INTERVAL, MADE_AGAIN, STAGES, Loss

sys.path.append(str(Path(__file__).resolve().parents[1]))
from recorded import recorded_results, recorded_shards


def _changed(table: pa.Table, change: Callable[[list[dict[str, Any]]], None]) -> pa.Table:
    rows = table.to_pylist()
    change(rows)
    return pa.Table.from_pylist(rows, table.schema)


def _drop(rows: list[dict[str, Any]]) -> None:
    del rows[3]


def _alter(column: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def alter(rows: list[dict[str, Any]]) -> None:
        rows[3][column] = value

    return alter


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (lambda rows: None, Loss(0, 0)),
        (_drop, Loss(1, 0)),
        (_alter("finish", "other"), Loss(0, 1)),
        (_alter("uid", "other"), Loss(1, 1)),
    ],
)
def test_of_a_collection(change: Callable[[list[dict[str, Any]]], None], loss: Loss, tmp_path: Path) -> None:
    for name in ("undisturbed", "output"):
        recorded_shards(tmp_path / name)
        (tmp_path / name / COLLECTED).write_text(json.dumps({"steps": 4, "agreement": 0.5}))
    (shard,) = (tmp_path / "output" / SHARDS).glob("*.arrow")
    table = pa.ipc.open_file(open_arrow(shard)).read_all()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    shard.write_bytes(sealed(_changed(table, change), metadata))
    assert STAGES["collect"].loss(tmp_path / "output", tmp_path / "undisturbed") == loss
    (tmp_path / "output" / COLLECTED).write_text(json.dumps({"steps": 5, "agreement": 0.5}))
    again = STAGES["collect"].loss(tmp_path / "output", tmp_path / "undisturbed")
    assert again == Loss(loss.lost, loss.differing + 1), "the summary differs too"


@pytest.mark.parametrize(
    ("change", "loss"),
    [
        (_drop, Loss(1, 0)),
        (_alter("output", "so \\boxed{4}"), Loss(0, 1)),
        (_alter("seconds", 99.0), Loss(0, 0)),
        (lambda rows: rows.append(rows[0]), Loss(0, 1)),
    ],
)
def test_of_a_benchmark(change: Callable[[list[dict[str, Any]]], None], loss: Loss, tmp_path: Path) -> None:
    for name in ("undisturbed", "output"):
        (tmp_path / name).mkdir()
        recorded_results(tmp_path / name / RESULTS)
    table = parquet.read_table(tmp_path / "output" / RESULTS)
    parquet.write_table(_changed(table, change), tmp_path / "output" / RESULTS)
    assert STAGES["benchmark"].loss(tmp_path / "output", tmp_path / "undisturbed") == loss


def test_of_an_analysis(tmp_path: Path) -> None:
    for name in ("undisturbed", "output"):
        (tmp_path / name).mkdir()
        for table in ("hits", "ranks"):
            (tmp_path / name / f"{table}.csv").write_text("k,hit\n1,0.5\n")
    compare = STAGES["analyse"].loss
    assert compare(tmp_path / "output", tmp_path / "undisturbed") == Loss(0, 0)
    (tmp_path / "output" / "hits.csv").write_text("k,hit\n1,0.6\n")
    (tmp_path / "output" / "ranks.csv").unlink()
    assert compare(tmp_path / "output", tmp_path / "undisturbed") == Loss(1, 1)


def test_steps_that_a_training_made_again_are_counted_group_by_group(tmp_path: Path) -> None:
    """Ten steps; five of them again, and on to 14; three of them again. That is more than may be, where it is more than
    two checkpoints' worth."""
    output = tmp_path / "out"
    for begun, end in ((0, 10), (5, 14), (11, 20)):
        curves = Curves(training_folder(output) / "selector-1" / CURVES)
        curves.begin(begun)
        for step in range(begun + 1, end + 1):
            curves.add(step, {"train/loss": 1.0})
    stage = STAGES["distil"]
    assert (stage.progress(output), stage.repeated(output)) == (20, 5)
    assert stage.repeated(output) <= MADE_AGAIN == 2 * INTERVAL
    Curves(training_folder(output) / "selector-1" / CURVES).begin(0)
    assert stage.repeated(output) == 20 > MADE_AGAIN
