"""Learning curves: points that are tiny but whole, at equal teacher cost, and going on from what is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_engine import encode, tiny_pair, torch_engines
from safetensors.torch import load_file

from benchmarks.label_efficiency import labels, measuring, report, training
from benchmarks.label_efficiency.__main__ import main, parse
from benchmarks.label_efficiency.choosing import ChosenBy
from benchmarks.label_efficiency.measuring import Case, Measured
from benchmarks.label_efficiency.plan import SYSTEMS, Experiment, Point, points
from benchmarks.label_efficiency.settings import experiment_of
from benchmarks.tsd_kd_sweep import main as tsd_kd_sweep
from pipelines.analyse.errors import Place
from pipelines.data.shards import read_shards
from pipelines.results.statistics import paired
from s2t_models.artifact import read_provenance
from s2t_models.engines.contract import Decision, Engine, Sampling
from s2t_models.policies.base import Decoded
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.training.selector import ROWS

SETTINGS = ["collect.prompts=8", "collect.max_new_tokens=40", "benchmark.max_new_tokens=8", "trigger_head.epochs=1"]
SETTINGS += ["trigger_head.positives=0.3", "distil.batch=2", "distil.steps=2", "distil.lora.rank=2", "slm.slots=8"]
SETTINGS += ["teacher.slots=8", "slm.context=256", "teacher.context=256"]


def command(folder: Path, *more: str) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    sizes = ["--prompts", "6", "--seeds", "1", "--items", "2", "--budgets", "0.05", "--jobs", "1"]
    what = ["--systems", "selector,kd,kd-at-triggers", "--tasks", "embedded"]
    return [*settings, *sizes, *what, "--folder", str(folder), *more]


def test_a_point_of_the_selector_and_of_kd_and_nothing_is_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    choosers, generate = set(), ChosenBy.generate

    async def noted(self: ChosenBy, *arguments: Any) -> Any:
        choosers.add((await self.chooser.card()).name)
        return await generate(self, *arguments)

    monkeypatch.setattr(ChosenBy, "generate", noted)
    assert main(command(tmp_path)) == 0
    assert choosers == {"kd"}
    table = capsys.readouterr().out
    records = [json.loads(line) for path in sorted((tmp_path / "points").iterdir()) for line in path.open()]
    by_system = {record["case"]["point"]["system"]: record for record in records}
    assert list(by_system) == ["base", "teacher", "selector", "kd", "kd-at-triggers"]
    assert all(len(record["correct"]) == 2 for record in records)
    assert [record["first_wrong"] is not None for record in records] == [False, False, True, False, True]
    assert not (tmp_path / "trained" / "kd-at-triggers-6-0").exists()
    assert by_system["kd-at-triggers"]["outcome"] == by_system["selector"]["outcome"]
    # How forwards were batched decides the last digits.
    assert by_system["kd-at-triggers"]["drift"] == pytest.approx(by_system["selector"]["drift"], rel=1e-3)
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
    labels.make_pool(own, "teacher")  # which neither of them needed
    written, _ = read_shards(labels.collection(own, Point("distil", 4)))
    order = [row["uid"] for row in rows.to_pylist()]
    assert [row["uid"] for row in written.to_pylist()][:3] == order[:3], "the same prompts, in the seed's order"
    tokens = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in rows.to_pylist()[:4]]
    by_teacher = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in written.to_pylist()]
    assert sum(tokens) - 120 < sum(by_teacher) <= sum(tokens)
    assert "selector @5%" in table
    assert "kd-at-triggers @5%" in table
    assert f"{read:,}" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy-embedded-at-5.png"}

    def again(*_: Any) -> None:
        raise AssertionError("asked again")

    for module, name in ((labels, "make_pool"), (training, "collection"), (measuring, "load")):
        monkeypatch.setattr(module, name, again)
    assert main(command(tmp_path)) == 0
    assert capsys.readouterr().out == table
    assert main(command(tmp_path, "--set", "distil.beta=1")) == 2
    assert "holds points of other settings (distil)" in capsys.readouterr().err


def test_s2ts_texts_trigger_at_a_tenth_of_the_slms_steps_and_cost_what_its_labels_do(tmp_path: Path):
    experiment = experiment_of(parse(command(tmp_path, "--systems", "kd-rescued")))
    point = Point("kd-rescued", 6)
    wanted = labels.writers(experiment, [point])
    assert wanted == ["slm", "s2t"]
    for writer in wanted:
        labels.make_pool(experiment, writer)
    threshold = labels.rescue_threshold(experiment)
    by_slm, by_s2t = (labels._pool(experiment, writer).to_pylist() for writer in wanted)
    kl = [value for row in by_slm for value in row["kl_T"]]
    assert sum(value >= threshold for value in kl) / len(kl) == pytest.approx(experiment.recipe.budget, abs=0.02)
    for row in by_s2t:
        if row["temperature"] == 0:  # unless the teacher chose, the best of the candidates that were drawn stands
            best = [step["candidates_K"][0] for step in row["kept"]]
            chosen = [n for n, (token, first) in enumerate(zip(row["output_ids"], best, strict=True)) if token != first]
            assert all(row["kl_T"][step] >= threshold for step in chosen)
    assert [row["output_ids"] for row in by_s2t] != [row["output_ids"] for row in by_slm]
    taken = read_shards(labels.collection(experiment, point))[0].to_pylist()
    order = np.random.default_rng(0).permutation(len(by_s2t))
    enough = sum(len(by_slm[n]["prompt_ids"] + by_slm[n]["output_ids"]) for n in order[:6])
    whole = [by_s2t[n] for n in order[: len(taken) + 1]]
    assert [row["output_ids"] for row in taken] == [row["output_ids"] for row in whole[:-1]]
    assert sum(row["teacher_read"] for row in taken) <= enough < sum(row["teacher_read"] for row in whole)


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
        assert (two[case].drift or 0) == pytest.approx(measured.drift or 0, rel=1e-3)
    drift = {case.point.system: measured.drift for case, measured in one.items()}
    assert drift["selector"] != drift["selector-from-kd"] != drift["kd+selector"]
    tensors = {
        name: load_file(tmp_path / "one" / "trained" / f"{name}-6-0" / training.TENSORS)
        for name in ("kd", "selector-from-kd")
    }
    assert tensors["selector-from-kd"].keys() - tensors["kd"].keys() == {ROWS}


def test_the_table_compares_with_kd_on_the_same_items_and_seeds(tmp_path: Path):
    rng = np.random.default_rng(0)

    def measured(system: str, prompts: int, seed: int, policy: str, share: float) -> Measured:
        outcome = None if system == "base" else training.Outcome(80, prompts, 100 * prompts + seed, 10)
        case = Case(Point(system, prompts, seed), "embedded", "same", policy)
        wrong: dict[Place, int] = {"at_triggered": 1 + seed, "elsewhere": 6, "nowhere": 2}
        first = wrong if "@" in policy else None
        return Measured(case, (rng.random(40) < share).tolist(), 0, 0.04, outcome and 0.5 + seed, outcome, first)

    base = measured("base", 0, 0, "greedy", 0.4)
    local = [measured("selector", 25, seed, "s2t-local@0.05", 0.9) for seed in (0, 1)]
    kd = [measured("kd", 25, seed, "kd", 0.5) for seed in (0, 1, 2)]
    distil = [measured("distil", 25, 0, "distil", 0.6)]
    rescued = [measured("selector-rescued", 25, seed, "s2t-local@0.05", 0.95) for seed in (0, 1)]
    table = report.write({one.case: one for one in (base, *local, *kd, *distil, *rescued)}, tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    found = {row[1]: dict(zip(rows[0], row, strict=True)) for row in rows}
    selector = found["selector @5%"]

    def right(runs: list[Measured], items: Sequence[int]) -> list[bool]:
        return [run.correct[item] for run in runs for item in items]

    def difference(other: list[Measured], items: Sequence[int], of: list[Measured] = local) -> str:
        runs = min(len(of), len(other))
        expected = paired([*items] * runs, right(of[:runs], items), right(other[:runs], items))
        low, high = (f"{100 * end:+.1f}" for end in (expected.low, expected.high))
        return f"{100 * expected.difference:+.1f} [{low}, {high}]"

    solved = [item for item in range(40) if base.correct[item]]
    assert selector["accuracy %"] == f"{100 * np.mean(right(local, range(40))):.1f}"
    assert selector["of each training"] == ", ".join(f"{100 * np.mean(run.correct):.1f}" for run in local)
    assert found["distil"]["of each training"] == "", "there is one"
    assert selector["against kd"] == difference(kd, range(40))
    assert selector["against distil"] == difference(distil, range(40))
    gain = found["selector-rescued @5%"]["gain of the rescue"]
    assert gain == difference(local, range(40), rescued)
    assert selector["gain of the rescue"] == ""
    assert selector["kept %"] == f"{100 * np.mean(right(local, solved)):.1f}"
    assert selector["kept against kd"] == difference(kd, solved)
    assert (found["kd"]["teacher read"], found["kd"]["teacher wrote"]) == ("2,501", "10")
    assert (found["kd"]["KL of the text head"], found["kd"]["against kd"]) == ("1.5000", "")
    assert found["kd"]["kept against kd"] == found["distil"]["against distil"] == ""
    assert found["kd"]["against distil"]
    assert (selector["triggered %"], found["kd"]["triggered %"]) == ("4.0", "")
    assert (selector["wrong at triggered"], selector["wrong elsewhere"]) == ("1.5", "6.0")
    assert found["kd"]["wrong elsewhere"] == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        "accuracy-embedded-at-5.png",
        "kept-embedded-at-5.png",
        "table.md",
    }


def test_a_sweep_trains_every_combination_on_validation_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = command(tmp_path, "--rates", "1e-9,0.3", "--entropies", "0,1", "--rankings", "0")
    assert tsd_kd_sweep(asked) == 0
    rows = [line.split("|")[2].split() for line in capsys.readouterr().out.splitlines() if line.startswith("| 6")]
    settings = {(rate, entropy) for rate in ("1e-9", "0.3") for entropy in ("0", "1")}
    named = [(f"distil.tsd_kd.learning_rate={rate}", f"distil.tsd_kd.entropy={entropy}") for rate, entropy in settings]
    assert {(name, rate, entropy) for name, rate, entropy, _ in rows} == {("tsd-kd", *one) for one in named}
    found = list(measuring.known(experiment_of(parse(asked[:-6]))).values())
    assert {one.case.task for one in found} == {"embedded-validation"}
    drift = {one.case.point.settings: one.drift for one in found if one.drift is not None}
    assert len(drift) == 4
    low, high = ([value for key, value in drift.items() if f"rate={rate} " in key] for rate in ("1e-9", "0.3"))
    assert max(low) < 1e-6 < min(high)
    assert high[0] != high[1]
    assert not (tmp_path / "labels" / "teacher").exists()


def test_where_settings_are_varied_the_table_goes_by_accuracy_and_nothing_is_drawn(tmp_path: Path):
    outcome, found = training.Outcome(1, 6, 100, 0), {}
    for right in (1, 3, 2):
        case = Case(Point("tsd-kd", 6, 0, f"distil.beta={right}"), "embedded-validation", "same", "tsd-kd")
        found[case] = Measured(case, [n < right for n in range(4)], 0, 0.0, 0.1, outcome, None, float(right))
    rows = [line.split("|") for line in report.write(found, tmp_path).splitlines() if line.startswith("| 6")]
    assert [row[2].strip() for row in rows] == [f"tsd-kd distil.beta={right}" for right in (3, 2, 1)]
    assert [row[report.HEADER.index("length") + 1].strip() for row in rows] == ["3.0", "2.0", "1.0"]
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_wrong_answers_are_counted_by_where_the_teacher_would_first_not_have_written_them():
    prompt, at = encode("8+5="), 3

    async def counted(teacher: Engine) -> dict[Place, int]:
        own = (await teacher.generate(prompt, Sampling(8))).ids
        state, every = prompt + own[:at], np.arange((await teacher.card()).vocabulary)[None]
        unlikely = int((await teacher.score(state, len(state), every)).logprobs_TN[0].argmin())
        spoiled = [*own[:at], unlikely, *own[at + 1 :]]

        def answer(ids: list[int], steps: Sequence[int]) -> Decoded:
            decisions = [Decision(step, 0.0, [], [], [], [], ids[step]) for step in steps]
            return Decoded(ids, "end", {}, [], decisions, [])

        answers = [answer(own, [at]), answer(spoiled, [at]), answer(spoiled, [at - 1]), answer(spoiled, [])]
        return await measuring._first_wrong(teacher, [(prompt, one) for one in answers])

    with torch_engines(tiny_pair()) as engines:
        assert asyncio.run(counted(engines["teacher"])) == {"at_triggered": 1, "elsewhere": 2, "nowhere": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tasks", "embedded,embedded-heldout"], "there is no task 'embedded-heldout'; the tasks are gsm8k,"),
        (["--systems", "kd,selecter"], "there is no 'selecter'; there are selector, kd,"),
        (["--budgets", "0.03"], "0.03 is not calibrated; there are 0.01, 0.02, 0.05"),
        (["--vary", "distil.beta"], "--vary distil.beta: give a setting of distil with its values"),
        (["--vary", "distil.beta=1,few"], 'distil.beta = "few": input should be a valid number'),
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
    return Experiment(load_recipe(recipe_path), tmp_path, (0.05,))


def test_points_stand_behind_what_they_take_up_and_train_for_longer_with_more_labels(experiment: Experiment):
    names = [point.name for point in points(["kd-at-triggers"], [25], 1)]
    assert names == ["kd-25-0", "selector-25-0", "kd-at-triggers-25-0"]
    found = points(["kd+selector", "selector", "distil"], [100, 25], 2)
    assert [point.name for point in found[:4]] == ["selector-25-0", "distil-25-0", "kd-25-0", "kd+selector-25-0"]
    assert [(point.prompts, point.seed) for point in found[::4]] == [(25, 0), (100, 0), (25, 1), (100, 1)]

    def trained(system: str, prompts: int) -> Recipe:
        return experiment.training(Point(system, prompts))

    assert [trained("kd", n).distil.steps for n in (25, 50, 100, 200, 400, 1600)] == [25, 50, 100, 200, 320, 320]
    assert [trained("tsd-kd", n).distil.steps for n in (25, 1600)] == [3, 190]
    assert [round(trained("kd", n).distil.validation * n) for n in (25, 1600)] == [4, 80]
