"""The loop's last stage over jobs of one task and of several; the stages before it are tested as pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from recorded import recorded_results

from pipelines import loop
from pipelines.benchmark import job
from pipelines.data.layout import COLLECTED, RESULTS, SUMMARY
from pipelines.results.summary import read_results, write_results
from s2t_models.recipe import load_recipe


@pytest.mark.parametrize("tasks", [("gsm8k",), ("gsm8k", "math500")])
def test_each_task_of_a_loop_has_its_summary(
    tasks: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the paper's recipes have six tasks: the figures of one are those of its rows alone."""
    calibration = tmp_path / "calibration"
    calibration.mkdir()
    (calibration / COLLECTED).write_text(json.dumps({"hit": {"1": 0.2, "8": 0.9}}))

    def benchmarked(recipe: Any, folder: Path, options: Any) -> tuple[str, str]:
        folder.mkdir()
        path = recorded_results(folder / RESULTS)
        metadata, rows = read_results(path)[1], pq.read_table(path).to_pylist()
        wrong = {"verdict": "wrong", "score": 0.0}
        changed = [row | {"task": task} | (wrong if task == "gsm8k" else {}) for task in tasks for row in rows]
        write_results(path, changed, metadata)
        return "the tables", "the link"

    monkeypatch.setattr(job, "benchmark", benchmarked)
    assert loop._compare(load_recipe("embedded"), calibration, tmp_path, None) == "the link"
    summary = json.loads((tmp_path / SUMMARY).read_text())
    by_task = summary["tasks"] if len(tasks) > 1 else {tasks[0]: summary}
    assert tuple(by_task) == tasks
    accuracy = {task: by_task[task]["policies"]["llm"]["accuracy"] for task in tasks}
    assert accuracy["gsm8k"] == 0
    assert accuracy.get("math500", 1) > 0
    shown = capsys.readouterr().out
    assert all(f"in points on the same problems of {task}:" in shown for task in tasks)
