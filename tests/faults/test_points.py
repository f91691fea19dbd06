"""What of the points takes seconds: damaged files of a killed collection, and the table; and a node that dies under a
collection, which is slow. `make test-faults` runs the rest."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipelines.collect import job
from pipelines.collect import prompts as sources
from pipelines.collect.actors import Labels, Rollouts
from pipelines.collect.publish import publish
from pipelines.collect.schemas import LABELLED, PROMPT
from pipelines.data.seal import sealed
from pipelines.data.shards import read_shards, shard_metadata
from pipelines.data.sink import DamagedFiles, committed, take_back
from s2t_models.hosting import collecting, pair
from s2t_models.recipe import load_recipe

from .points import MISSED, Point, plan, record, recorded, table
from .stages import STAGES

SETTINGS = [
    "collect.writer=slm",
    "collect.prompts=24",
    "collect.max_new_tokens=48",
    "collect.rollout.actors=2",
    "collect.rollout.batch=4",
    "collect.rollout.num_cpus=0.5",
    "collect.label.batch=4",
    "collect.label.num_cpus=0.5",
]


@pytest.fixture
def node(ray_cluster: str) -> Iterator[Any]:
    """One more raylet on the session's cluster."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.head_node = ray._private.worker.global_worker.node
    cluster.redis_address = cluster.head_node.redis_address
    added = cluster.add_node(num_cpus=8)
    yield added
    cluster.remove_node(added, allow_graceful=False)


@pytest.mark.slow
def test_a_node_that_dies_costs_a_collection_no_row(node: Any, recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, SETTINGS)
    draw = random.Random(0)
    work = tmp_path / "work"
    wanted = draw.randrange(1, 4)

    def kill() -> None:
        while len(committed(work / "labelled", work / "checkpoint")) < wanted:
            time.sleep(0.05)
        node.all_processes["raylet"][0].process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    job.collect(recipe, tmp_path)
    killer.join(1)
    assert not killer.is_alive(), "the node died while the collection ran"
    found = {row["uid"]: row for row in read_shards(tmp_path)[0].to_pylist()}

    engines = pair(recipe)
    asked = sources.rows(sources.from_task(recipe.collect.task, None, recipe), recipe)
    expected = Labels(recipe, engines["teacher"])(Rollouts(recipe, engines["slm"])(pa.Table.from_pylist(asked, PROMPT)))
    assert found.keys() == set(expected["uid"].to_pylist())
    for row in expected.to_pylist():
        for column in ("output_ids", "finish", "teacher_argmax_T", "teacher_rank_T", "error"):
            assert found[row["uid"]][column] == row[column]


def test_damaged_files_are_found_before_anything_is_published_and_taken_back(tmp_path: Path) -> None:
    labelled, checkpoint = tmp_path / "labelled", tmp_path / "checkpoint"
    for folder in (labelled, checkpoint):
        folder.mkdir()
    for number, name in enumerate("abcd"):
        rows = pa.Table.from_pylist([{"index": 3 * number + i, "uid": f"{name}{i}"} for i in range(3)], LABELLED)
        (labelled / f"{name}.arrow").write_bytes(sealed(rows))
        parquet.write_table(rows.select(["uid"]), checkpoint / f"{name}.parquet")
    content = bytearray((labelled / "a.arrow").read_bytes())
    content[len(content) // 2] ^= 4
    (labelled / "a.arrow").write_bytes(content)
    (labelled / "b.arrow").write_bytes((labelled / "b.arrow").read_bytes()[:-100])
    (labelled / "c.arrow").unlink()
    with pytest.raises(DamagedFiles) as found:
        publish(committed(labelled, checkpoint), 12, tmp_path, {}, load_recipe("embedded"))
    assert [path.stem for path, _ in found.value.files] == ["a", "b", "c"]
    for path, _ in found.value.files:
        take_back(path, checkpoint)
    assert committed(labelled, checkpoint) == [labelled / "d.arrow"]
    assert [path.stem for path in labelled.iterdir()] == ["d"]


def test_a_collection_makes_the_rows_of_damaged_files_again(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(recipe_path, [*SETTINGS, "collect.prompts=6"])
    hosting = collecting(recipe)
    asked = pa.Table.from_pylist(sources.rows(sources.from_task(recipe.collect.task, None, recipe), recipe), PROMPT)
    made = Labels(recipe, hosting.engines["teacher"])(Rollouts(recipe, hosting.engines["slm"])(asked))
    labelled, checkpoint = tmp_path / "work" / "labelled", tmp_path / "work" / "checkpoint"
    for folder in (labelled, checkpoint):
        folder.mkdir(parents=True)
    runs: list[list[str]] = []

    def run(*_: Any) -> list[Path]:
        """What Ray does in `_run`: the rows that are not committed."""
        missing = [i for i in range(3) if not (checkpoint / f"{i}.parquet").is_file()]
        for i in missing:
            part = made.slice(2 * i, 2)
            (labelled / f"{i}.arrow").write_bytes(sealed(part)[: None if runs else -50 * i or None])
            parquet.write_table(part.select(["uid"]), checkpoint / f"{i}.parquet")
        runs.append([f"{i}" for i in missing])
        return committed(labelled, checkpoint)

    monkeypatch.setattr(job, "_run", run)
    metadata = shard_metadata(recipe, "s", "t", "tok", "embedded-train")
    job._make(hosting, tmp_path, asked.to_pylist(), metadata)
    assert runs == [["0", "1", "2"], ["1", "2"]]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": not")[0] for line in lines] == [f"collect: {labelled}/{i}.arrow" for i in (1, 2)]
    assert read_shards(tmp_path)[0]["uid"].to_pylist() == asked["uid"].to_pylist()


def test_each_fault_of_a_stage_has_its_turn() -> None:
    trials = plan(list(STAGES), [], 50)
    counts = Counter((trial.stage.name, fault.name) for trial in trials for fault in trial.faults)
    assert {name for name, _ in counts} == set(STAGES)
    assert min(counts.values()) >= 3
    for name in STAGES:
        numbers = [number for trial in trials if trial.stage.name == name for number in trial.numbers]
        assert sorted(numbers) == list(range(50))
    assert all(len(trial.faults) == 1 for trial in trials if any(fault.alone for fault in trial.faults))
    (killed, full) = plan(["collect"], ["actor killed", "driver killed", "disk full"], 3)
    assert [fault.name for fault in killed.faults] == ["actor killed", "driver killed"]
    assert [fault.name for fault in full.faults] == ["disk full"]
    assert (killed.numbers, full.numbers) == ((0, 1), (2,))


def test_the_table_adds_up_what_was_recorded(tmp_path: Path) -> None:
    lost = Point("collect", "disk full", 1, 1, "its place", "8 KiB", 2, 1, 0, 1, 20.0, "collect: the disk is full")
    well = Point("collect", "disk full", 2, 2, "its place", "9 KiB", 0, 0, 0, 2, 20.0, "")
    late = replace(well, number=3, moment=MISSED)
    for point in (lost, well):
        record(point, tmp_path / "points.jsonl")
    assert recorded(tmp_path / "points.jsonl") == [lost, well]
    assert recorded(tmp_path / "none.jsonl") == []
    other = replace(well, stage="benchmark", fault="node left", reruns=0)
    head, _, *rows = table([other, lost, well, late]).splitlines()
    assert head == "| fault | collect | benchmark | lost rows | differing rows | unclear errors | reruns |"
    assert rows == [
        "| disk full | 2 |  | 2 | 1 | 0 | 3 |",
        "| node left |  | 1 | 0 | 0 | 0 | 0 |",
        "| all | 2 | 1 | 2 | 1 | 0 | 3 |",
    ]
    assert str(lost).endswith("lost 2, differing 1, reruns 1, 20 s: collect: the disk is full")
