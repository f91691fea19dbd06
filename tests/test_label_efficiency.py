"""Learning curves: points that are tiny but whole, at equal teacher cost, and going on from what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.label_efficiency import labels, measuring, training
from benchmarks.label_efficiency.__main__ import main, parse
from benchmarks.label_efficiency.plan import SYSTEMS, Experiment, Point, points
from benchmarks.label_efficiency.settings import experiment_of
from pipelines.data.shards import read_shards
from s2t_models.artifact import read_provenance
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.training.selector import ROWS

SETTINGS = ["collect.prompts=8", "collect.max_new_tokens=40", "benchmark.max_new_tokens=8", "trigger_head.epochs=1"]
SETTINGS += ["trigger_head.positives=0.3", "distil.batch=2", "distil.steps=2", "distil.lora.rank=2", "slm.slots=8"]
SETTINGS += ["teacher.slots=8", "slm.context=256", "teacher.context=256"]


def command(folder: Path, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    sizes = ["--prompts", "6", "--seeds", "1", "--items", "2", "--least-steps", "1", "--budgets", "0.05", "--jobs", "1"]
    return [*settings, *sizes, "--systems", "selector,kd", "--tasks", "embedded", "--folder", str(folder), *more]


def test_a_point_of_the_selector_and_of_kd_and_nothing_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert main(command(tmp_path)) == 0
    table = capsys.readouterr().out
    records = [json.loads(line) for path in sorted((tmp_path / "points").iterdir()) for line in path.open()]
    by_system = {record["case"]["point"]["system"]: record for record in records}
    assert list(by_system) == ["base", "teacher", "selector", "kd"]
    assert all(len(record["correct"]) == 2 for record in records)
    for name in ("selector", "kd"):
        provenance = read_provenance(tmp_path / "trained" / f"{name}-6-0" / "model")
        rows, _ = read_shards(tmp_path / "trained" / f"{name}-6-0" / "labels")
        read = sum(len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows.to_pylist())
        assert len(rows) == 6
        assert provenance is not None
        assert provenance.teacher is not None
        assert (provenance.teacher.read, provenance.teacher.written) == (read, 0)
        assert by_system[name]["outcome"] == {"steps": 2, "texts": 6, "teacher_read": read, "teacher_written": 0}
        assert by_system[name]["drift"] > 0
    own = experiment_of(parse(command(tmp_path)))
    written, _ = read_shards(labels.collection(own, Point("distil", 4)))
    order = [row["uid"] for row in rows.to_pylist()]
    assert [row["uid"] for row in written.to_pylist()][:3] == order[:3], "the same prompts, in the seed's order"
    tokens = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows.to_pylist()[:4]]
    by_teacher = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in written.to_pylist()]
    assert sum(tokens) - 120 < sum(by_teacher) <= sum(tokens)
    assert "selector @5%" in table
    assert f"{read:,}" in table
    assert {path.name for path in tmp_path.glob("*.png")} >= {"accuracy-embedded.png"}

    def again(*_: Any) -> None:
        raise AssertionError("asked again")

    for module, name in ((labels, "make_pool"), (training, "collection"), (measuring, "load")):
        monkeypatch.setattr(module, name, again)
    assert main(command(tmp_path)) == 0
    assert capsys.readouterr().out == table
    assert main(command(tmp_path, "--set", "distil.beta=1")) == 2
    assert "holds points of other settings (distil)" in capsys.readouterr().err


@pytest.mark.slow
def test_every_system_has_its_point_and_two_processes_give_what_one_does(tmp_path: Path):
    systems = ["--systems", ",".join(SYSTEMS)]
    for folder, jobs in (("one", "1"), ("two", "2")):
        assert main(command(tmp_path / folder, *systems, "--jobs", jobs)) == 0
    one, two = (measuring.known(experiment_of(parse(command(tmp_path / folder)))) for folder in ("one", "two"))
    assert len(one) == 2 + len(SYSTEMS)
    for case, measured in one.items():
        assert two[case].correct == measured.correct
        assert two[case].outcome == measured.outcome
        assert two[case].drift == pytest.approx(measured.drift, rel=1e-3)
    drift = {case.point.system: measured.drift for case, measured in one.items()}
    assert drift["selector"] != drift["selector-from-kd"] != drift["kd+selector"]
    tensors = {
        name: load_file(tmp_path / "one" / "trained" / f"{name}-6-0" / training.TENSORS)
        for name in ("kd", "selector-from-kd")
    }
    assert tensors["selector-from-kd"].keys() - tensors["kd"].keys() == {ROWS}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "embedded,embedded-heldout"], "there is no task 'embedded-heldout'; the tasks are gsm8k,"),
        (["--systems", "kd,selecter"], "there is no 'selecter'; there are selector, kd,"),
        (["--budgets", "0.03"], "0.03 is not calibrated; there are 0.01, 0.02, 0.05"),
        (["--prompts", "6,9"], "--prompts: give from 2 to 8"),
        (["--tasks", "embedded-train", "--items", "4000"], "share"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
):
    assert main(command(tmp_path / "curves", *options)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "curves").exists()


@pytest.fixture
def experiment(recipe_path: Path, tmp_path: Path) -> Experiment:
    return Experiment(load_recipe(recipe_path), tmp_path, (0.05,), 80)


def test_points_stand_behind_what_they_take_up_and_train_for_longer_with_more_labels(experiment: Experiment):
    found = points(["kd+selector", "selector", "distil"], [100, 25], 2)
    assert [point.name for point in found[:4]] == ["selector-25-0", "distil-25-0", "kd-25-0", "kd+selector-25-0"]
    assert [(point.prompts, point.seed) for point in found[::4]] == [(25, 0), (100, 0), (25, 1), (100, 1)]

    def trained(system: str, prompts: int) -> Recipe:
        return experiment.training(Point(system, prompts))

    assert [trained("kd", n).distil.steps for n in (25, 50, 100, 200, 400, 1600)] == [80, 80, 100, 200, 320, 320]
    assert [trained("tsd-kd", n).distil.steps for n in (25, 1600)] == [3, 190]
    assert [round(trained("kd", n).distil.validation * n) for n in (25, 1600)] == [4, 80]
