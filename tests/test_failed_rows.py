"""Rows of a collection whose calls failed are asked again once before they are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipelines.collect import job
from pipelines.collect import prompts as sources
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.schemas import LABELLED, PROMPT
from pipelines.data.seal import sealed
from pipelines.data.shards import read_shards, shard_metadata
from pipelines.data.sink import committed
from s2t_models.errors import NothingDone
from s2t_models.hosting import collecting
from s2t_models.recipe import load_recipe
from s2t_models.storage import Location

NO_ROOM = "failed: OutOfMemoryError: no room"
TOO_LONG = "too long: 9 tokens"
Make = Callable[[list[dict[int, str]]], list[list[int]]]


@pytest.fixture
def make(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a collection of six rows, two a file. In each run the rows of that number have that error; returns the
    files that each run made."""
    recipe = load_recipe(recipe_path, ["collect.writer=slm", "collect.prompts=6", "collect.max_new_tokens=48"])
    hosting = collecting(recipe)
    asked = pa.Table.from_pylist(sources.rows(sources.from_task(recipe.collect.task, None, recipe), recipe), PROMPT)
    rollouts = Rollouts(recipe, hosting.engines["slm"])(asked)
    rows = Labels(recipe, hosting.engines["teacher"])(rollouts).to_pylist()
    steps = ("teacher_read", "kl_T", "entropy_T", "teacher_argmax_T", "teacher_rank_T", "kept")
    labelled, checkpoint = tmp_path / "work" / "labelled", tmp_path / "work" / "checkpoint"
    for folder in (labelled, checkpoint):
        folder.mkdir(parents=True)

    def made(errors: list[dict[int, str]]) -> list[list[int]]:
        runs: list[list[int]] = []

        def run(*_: Any) -> list[Location]:
            """What Ray does in `_run`: the rows that are not committed."""
            missing = [i for i in range(3) if not (checkpoint / f"{i}.parquet").is_file()]
            failed = errors[len(runs)]
            for i in missing:
                part = [
                    rows[at] | ({"error": failed[at]} | dict.fromkeys(steps) if at in failed else {})
                    for at in (2 * i, 2 * i + 1)
                ]
                table = pa.Table.from_pylist(part, LABELLED)
                (labelled / f"{i}.arrow").write_bytes(sealed(table))
                parquet.write_table(table.select(["uid"]), checkpoint / f"{i}.parquet")
            runs.append(missing)
            return committed(labelled, checkpoint)

        monkeypatch.setattr(job, "_run", run)
        metadata = shard_metadata(recipe, "s", "t", "tok", "embedded-train")
        job._make(hosting, tmp_path, asked.to_pylist(), metadata)
        return runs

    return made


def errors_of(output: Path) -> list[str | None]:
    return read_shards(output)[0]["error"].to_pylist()


def test_a_row_whose_call_failed_is_asked_again_and_one_whose_prompt_is_at_fault_is_not(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make([{0: TOO_LONG, 3: NO_ROOM}, {}]) == [[0, 1, 2], [1]]
    assert errors_of(tmp_path) == [TOO_LONG, None, None, None, None, None]
    said = f"collect: 1 of 6 rows failed (the first: {NO_ROOM}); these are asked again\n"
    assert capsys.readouterr().err == said


def test_rows_that_fail_again_stay_errors(make: Make, tmp_path: Path) -> None:
    assert make([{1: NO_ROOM, 4: NO_ROOM}, {4: NO_ROOM, 5: NO_ROOM}]) == [[0, 1, 2], [0, 2]]
    assert errors_of(tmp_path) == [None, None, None, None, NO_ROOM, NO_ROOM]


def test_where_every_row_failed_twice_there_is_nothing_to_publish(make: Make, tmp_path: Path) -> None:
    everything = dict.fromkeys(range(6), NO_ROOM)
    with pytest.raises(NothingDone, match="all 6 rows errored") as refused:
        make([everything, everything])
    assert f"the first: {NO_ROOM}" in str(refused.value)
