"""The loop's last stage over jobs of one task and of several; the stages before it are tested as pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from recorded import recorded_results

from pipelines import loop
from pipelines.analyse import reading
from pipelines.analyse.audit import TEACHER_ON_WRITTEN
from pipelines.analyse.kept import READ, keep
from pipelines.analyse.reading import ReadingError
from pipelines.data.layout import COLLECTED, RESULTS, SUMMARY
from pipelines.results.summary import read_results, write_results
from pipelines.tasks import load
from s2t_models.errors import UserError
from s2t_models.loading import load_tokenizer
from s2t_models.recipe import Recipe, load_recipe
from serving import cluster


@pytest.mark.parametrize("tasks", [("gsm8k",), ("gsm8k", "math500")])
def test_each_task_of_a_loop_has_its_summary(
    tasks: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the paper's recipes have six tasks: the figures of one are those of its rows alone."""
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    (calibration / COLLECTED).write_text(json.dumps({"hit": {"1": 0.2, "8": 0.9}}))

    folder = tmp_path / "benchmark"
    folder.mkdir()
    metadata = read_results(recorded_results(folder / RESULTS))[1]
    rows = pq.read_table(folder / RESULTS).to_pylist()
    wrong = {"verdict": "wrong", "score": 0.0}
    changed = [
        row | {"task": task, "key": f"{task}/{row['key']}"} | (wrong if task == "gsm8k" else {})
        for task in tasks
        for row in rows
    ]
    write_results(folder / RESULTS, changed, metadata)
    recipe = load_recipe("embedded")
    loop._summarise(recipe, calibration, tmp_path, "the tables")
    assert "first_wrong" not in (tmp_path / SUMMARY).read_text(), "the teacher has read nothing"

    # Of gsm8k's s2t it has read three answers, whose second token it would not have written; only one triggered there.
    frame, _ = read_results(folder / RESULTS)
    chosen = frame.index[(frame["task"] == "gsm8k") & (frame["policy"] == "s2t")][:3]
    for row, step in zip(chosen, (1, 0, 2), strict=True):
        frame.at[row, "decisions"] = json.dumps([{"step": step}])
    views = pd.Series([[0.9, 0.01, 0.9]] * 3, index=chosen).reindex(frame.index)
    keep(folder, READ, frame.assign(**{TEACHER_ON_WRITTEN: views}), metadata)
    capsys.readouterr()
    loop._summarise(recipe, calibration, tmp_path, "the tables")
    summary = json.loads((tmp_path / SUMMARY).read_text())
    by_task = summary["tasks"] if len(tasks) > 1 else {tasks[0]: summary}
    assert tuple(by_task) == tasks
    accuracy = {task: by_task[task]["policies"]["llm"]["accuracy"] for task in tasks}
    assert accuracy["gsm8k"] == 0
    assert accuracy.get("math500", 1) > 0
    assert by_task["gsm8k"]["first_wrong"] == {
        "s2t": {"wrong": 80, "read": 3, "at_triggered": 1, "elsewhere": 2, "nowhere": 0}
    }
    shown = capsys.readouterr().out
    assert "the tables" in shown
    assert all(f"in points on the same problems of {task}:" in shown for task in tasks)
    assert ["gsm8k", "s2t", "80", "3", "1", "2", "0"] in [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in shown.splitlines()
    ]

    write_results(folder / RESULTS, [row | {"key": f"other/{row['key']}"} for row in changed], metadata)
    assert loop._answers(folder) == folder / RESULTS, "what it read are other answers"


def test_calibration_prompts_are_collected_first_and_s2t_triggers_by_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: dict[Path, Recipe] = {}

    def ends(*_: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(cluster, "start", lambda: None)
    monkeypatch.setattr(loop, "_collect", lambda recipe, folder, data: collected.setdefault(folder, recipe))
    monkeypatch.setattr(loop, "_distil", ends)
    for settings, trigger in (
        (["collect.writer=s2t"], (None, str(tmp_path / "0" / "calibration"))),
        (["collect.writer=s2t", "trigger.threshold=0.5"], (0.5, None)),
        (["collect.writer=slm"], (None, None)),
    ):
        collected.clear()
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(UserError, match="far enough"):
            loop.loop(load_recipe("embedded", settings), output)
        (calibration, greedy), (train, own) = collected.items()
        assert (calibration, train) == (output / "calibration", output / "train")
        assert (greedy.collect.writer, greedy.collect.sampled) == ("slm", 0.0)
        assert (own.trigger.threshold, own.trigger.calibration) == trigger


def test_a_teacher_that_cannot_read_costs_the_loop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> int:
        raise ReadingError("the teacher is ill")

    monkeypatch.setattr(reading, "read_wrong", fails)
    loop._read(load_recipe("embedded"), tmp_path, None)
    assert "loop: the teacher is ill; the other figures are whole" in capsys.readouterr().err


def test_the_teacher_reads_wrong_answers_on_the_cluster_once(ray_cluster: str, tmp_path: Path) -> None:
    recipe = load_recipe("embedded")
    metadata = read_results(recorded_results(tmp_path / RESULTS))[1]
    item = load("embedded", None)[1][0]
    solution = load_tokenizer(recipe.slm).encode(item.metadata["solution"])
    local = [row for row in pq.read_table(tmp_path / RESULTS).to_pylist() if row["policy"] == "s2t-local"]
    verdicts = ("wrong", "correct", "wrong")
    answered = ({"item": item.uid, "verdict": verdict, "output_ids": solution} for verdict in verdicts)
    rows = [row | changes for row, changes in zip(local, answered, strict=False)]
    write_results(tmp_path / RESULTS, rows, metadata)
    assert reading.read_wrong(tmp_path, recipe) == 2
    views = read_results(tmp_path / READ)[0][TEACHER_ON_WRITTEN]
    assert [None if view is None else len(view) for view in views] == [len(solution), None, len(solution)]
    written = (tmp_path / READ).stat().st_mtime_ns
    assert reading.read_wrong(tmp_path, recipe) == 2
    assert (tmp_path / READ).stat().st_mtime_ns == written
