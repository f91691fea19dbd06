"""The paper's tables: what a matrix runs and what it does not run again, and each figure against the rows it is of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from made_up import card, provenance
from recorded import ITEMS, RECIPE, recorded_results, recorded_shards

from pipelines.analyse.shard_tables import read_steps
from pipelines.data.layout import COLLECTED, RESULTS
from pipelines.data.shards import read_shards
from pipelines.paper import job as paper_job
from pipelines.paper.__main__ import main
from pipelines.paper.evidence import Evidence
from pipelines.paper.job import collections_beside, given, paper
from pipelines.paper.matrix import load_matrix
from pipelines.paper.published import policies_in, published
from pipelines.paper.runs import CALIBRATION, Given, Run, Runs, training_of
from pipelines.paper.specs import SPECS
from pipelines.paper.tables import NOT_RUN
from pipelines.results.summary import read_results
from s2t_models.errors import UserError
from s2t_models.policies.variants import variant
from s2t_models.recipe import load_recipe
from serving.cluster import LOCAL_CPUS

MATRIX = """
collections: {train: {of: train}, calibration: {of: calibration}, states: {of: tasks}}
trainings: {selector: {objective: selector}, kd: {objective: kd}, tah: {objective: unheard-of},
  r8-b30: {objective: selector, set: {reserved.count: 8, distil.beta: 30}},
  same: {objective: selector, set: {distil.beta: 20}}}
benchmarks:
  main: {policies: [greedy, tah, s2t-local, takeover, s2t, kd, llm, ft-selector]}
  seeds: {policies: [greedy, s2t-local], seeds: [0, 1]}
  sweep: {policies: [[s2t-local:r8-b30, s2t-local:same], [ft-r8-b30]], tasks: [math500], seeds: [4], items: 10}
"""


@pytest.fixture
def job(tmp_path: Path) -> Given:
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    return given(load_recipe(RECIPE), tmp_path / "out", tmp_path / "matrix.yaml", items=ITEMS)


def record(job: Given) -> None:
    """What the runs of the matrix would leave: answers of two benchmarks, and the rollouts of the task's prompts."""
    runs = Runs(job)
    for part in ("main", "seeds"):
        folder = runs.folder(Run("benchmark", part))
        folder.mkdir(parents=True)
        recorded_results(folder / RESULTS, **{"s2t.recipe": runs.benchmark_recipe(part).model_dump_json()})
    states = runs.folder(Run("collection", "states", "embedded"))
    recorded_shards(states)
    (states / COLLECTED).write_text("{}")


def test_every_table_and_figure_is_written_with_the_papers_value_and_what_is_left_open(job: Given) -> None:
    record(job)
    assert paper(job, runs_too=False) == 0
    frame, _ = read_results(Runs(job).folder(Run("benchmark", "main")) / RESULTS)

    first = pd.read_csv(job.output / "tables" / "table-1.csv").set_index(["task", "policy"])
    for policy in ("greedy", "s2t", "s2t-local", "takeover", "llm"):
        share = (frame[frame["policy"] == policy]["verdict"] == "correct").mean()
        assert first.loc[("embedded", policy), "ours"] == pytest.approx(100 * share, abs=1e-3)
    assert first.loc[("math500", "s2t-local"), ["paper 0.5B", "paper 1.5B"]].tolist() == [46.8, 67.5]
    assert first.loc[("math500", "s2t-local"), "left open"] == NOT_RUN
    assert first.loc[("embedded", "tah"), "left open"].startswith(
        "this build has no objective unheard-of; it has selec"
    )
    assert first.loc[("embedded", "kd"), "left open"] == "the training kd is not there"
    assert first[first["ours"].isna() & first["left open"].isna()].empty, "what is not there has a reason"

    steps = read_steps(*read_shards(Runs(job).folder(Run("collection", "states", "embedded"))))
    top = np.argsort(-steps.kl_T)[: round(0.1 * len(steps.kl_T))]  # the recipe's budget
    seventh = pd.read_csv(job.output / "tables" / "table-A7.csv").set_index(["task", "metric"])
    assert seventh.loc[("embedded", "Hit@8"), "ours"] == pytest.approx(100 * (steps.rank_T[top] < 8).mean(), abs=1e-3)
    assert seventh.loc[("mmlu_pro", "Hit@8"), "paper Phi-3-mini"] == 93.5

    decisions = [d for text in frame[frame["policy"] == "s2t-local"]["decisions"] for d in json.loads(text)]
    ninth = pd.read_csv(job.output / "tables" / "table-A9.csv").set_index(["task", "metric"])
    agreed = np.mean([d["chosen"] == d["argmax"] for d in decisions])
    assert ninth.loc[("embedded", "Agree@1"), "ours"] == pytest.approx(100 * agreed, abs=1e-3)
    groups = pd.read_csv(job.output / "tables" / "table-F.6.csv").set_index(["task", "metric"])["ours"]
    assert groups["embedded", "agree accuracy"] > groups["embedded", "disagree accuracy"]
    deviation = pd.read_csv(job.output / "tables" / "table-A6.csv").set_index(["task", "policy", "metric"])["ours"]
    by_seed = (frame[frame["policy"] == "greedy"]["verdict"] == "correct").groupby(frame["seed"]).mean()
    assert deviation["embedded", "greedy", "deviation"] == pytest.approx(100 * by_seed.std(), abs=1e-3)

    unread = (job.output / "tables" / "figure-first-wrong.md").read_text()
    assert "- left open: s2t-local on embedded: the teacher was not asked about these answers" in unread

    page = (job.output / "paper.md").read_text()
    for spec in SPECS:
        assert (job.output / "tables" / f"{spec.stem}.md").is_file()
        assert spec.title in page
    assert "(../figures/figure-3.png)" in (job.output / "tables" / "figure-3.md").read_text()
    assert "embedded, Avg. \\|C\\|" in page, "a bar would end the cell"
    for stem in ("figure-3", "figure-A3", "figure-A4", "figure-4-b-embedded-s2t-local", "figure-A5-embedded"):
        assert (job.output / "figures" / f"{stem}.png").stat().st_size > 5000
        assert "<svg" in (job.output / "figures" / f"{stem}.svg").read_text()
    assert "it is of gemma-2-2b, and this recipe's SLM is embedded:slm" in page
    assert "the matrix has no benchmark budgets" in page
    paper_runs = "tags.`s2t.stage` = 'paper'"
    (run, *_) = mlflow.search_runs(experiment_names=["s2t"], filter_string=paper_runs, output_format="list")
    logged = mlflow.MlflowClient().list_artifacts(run.info.run_id, "tables")
    assert {"tables/table-1.csv", "tables/table-1.md", "tables/table-1.json"} <= {entry.path for entry in logged}


def test_a_finished_run_is_not_made_again_and_a_failed_one_costs_the_others_nothing(
    job: Given, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(job)
    made = []

    def make(self: Runs, run: Run) -> str:
        made.append(run.name)
        if run.name == "collection train":
            raise UserError("the disk is on fire; put it out")
        self.folder(run).mkdir(parents=True, exist_ok=True)
        (self.folder(run) / COLLECTED).write_text("{}")
        return "made"

    monkeypatch.setattr(Runs, "make", make)
    monkeypatch.setattr(Runs, "why_not", lambda self, run: None if run.kind == "collection" else "not today")
    assert paper(job, only=("1", "figure-3")) == 1
    assert made == ["collection calibration", "collection train"], "states and main were there"
    assert "paper: 1 runs failed: collection train; the same command tries again" in capsys.readouterr().err
    kd = pd.read_csv(job.output / "tables" / "table-1.csv").set_index(["task", "policy"]).loc[("embedded", "kd")]
    assert kd["left open"] == "not today"
    assert not (job.output / "tables" / "table-A1.csv").exists()
    made.clear()
    assert paper(job, only=("figure-3",)) == 0
    assert made == []

    other = given(load_recipe(RECIPE, ["budget=0.2"]), job.output, items=ITEMS)
    with pytest.raises(paper_job.PaperError, match="holds the runs of another recipe"):
        paper(other)


def test_what_was_trained_is_in_the_recipe_of_the_benchmarks_that_name_it(job: Given) -> None:
    runs, recipe = Runs(job), job.recipe
    names = [run.name for run in runs.all()]
    assert names[:4] == [
        "collection calibration",
        "collection train",
        "collection states embedded",
        "training selector",
    ]
    assert [run.name for run in runs.needed(["sweep"])] == [
        *("collection calibration", "collection train", "training r8-b30", "training same", "benchmark sweep"),
    ]
    assert runs.why_not(Run("training", "kd")) == "the collection train is not there"
    assert "this build has no objective unheard-of" in str(runs.never(Run("training", "tah")))
    assert runs.benchmark_recipe("main").benchmark.policies == ("greedy", "llm")

    slm = Path(recipe.slm.path.replace("embedded:", "s2t_models/embedded/weights/"))
    slm = RECIPE.parent.parent.parent / slm
    trained = {"selector": recipe, "r8-b30": recipe.changed({"reserved.count": 8, "distil.beta": 30})}
    for name, own in trained.items():
        folder = job.output / "trainings" / name
        shutil.copytree(slm, folder / "model")
        (folder / "trigger_head.safetensors").write_bytes(b"")
        made = card(own, {"head": {0.1: 0.0}, "kl": {0.1: 1.0}})
        known = made.provenance.model_copy(update={"recipe": own.digest()})
        (folder / "artifact.json").write_text(made.model_copy(update={"provenance": known}).model_dump_json())
    shutil.copytree(slm, job.output / "trainings" / "kd")
    provenance(objective="kd", recipe=recipe.digest()).write(job.output / "trainings" / "kd")

    asked = runs.benchmark_recipe("main")
    assert asked.benchmark.policies == ("greedy", "s2t-local", "takeover", "s2t", "kd", "llm", "ft-selector")
    assert asked.artifact == str(job.output / "trainings" / "selector")
    assert asked.checkpoints == {
        "kd": str(job.output / "trainings" / "kd"),
        "ft-selector": str(job.output / "trainings" / "selector" / "model"),
    }
    assert (asked.benchmark.items, asked.benchmark.task) == (ITEMS, ("embedded",))
    swept = runs.benchmark_recipe("sweep")
    assert swept.artifacts == {
        "r8-b30": str(job.output / "trainings" / "r8-b30"),
        "same": str(job.output / "trainings" / "selector"),  # the selector's own settings
    }
    assert (swept.benchmark.items, swept.benchmark.seeds) == (10, (4,))
    assert runs.is_done(Run("training", "same"))
    changed = Runs(given(load_recipe(RECIPE, ["distil.steps=7"]), job.output))
    assert not changed.is_done(Run("training", "selector")), "trained with other settings"


def test_the_engines_of_each_benchmark_that_ships_fit_the_cluster_that_a_job_starts_here() -> None:
    matrix = load_matrix(None)
    for name, part in matrix.benchmarks.items():
        engines = {"slm", "teacher"}
        for policy in part.policies:
            trained = matrix.trainings.get(training_of(policy) or "")
            if trained and trained.objective not in ("router", "tah"):  # which are of the SLM's engine
                engines.add(found.artifact or "selector" if (found := variant(policy)) else policy)
        assert len(engines) <= LOCAL_CPUS, name


def test_the_collections_of_a_loop_are_taken_beside_its_recipe(tmp_path: Path) -> None:
    for name in ("train", "calibration"):
        (tmp_path / name).mkdir()
    (tmp_path / "train" / COLLECTED).write_text("{}")
    assert collections_beside(str(tmp_path / "recipe.yaml")) == {"train": tmp_path / "train"}
    assert collections_beside(str(tmp_path / "mine.yaml")) == {}
    recipe = load_recipe(RECIPE).model_copy(update={"artifact": "made", "checkpoints": {"kd": "made"}})
    runs = Runs(given(recipe, tmp_path / "out", collections=collections_beside(str(tmp_path / "recipe.yaml"))))
    assert runs.is_done(Run("collection", "train"))
    names = {run.name for run in runs.all()}
    assert {"training router", "training r8-b30"} <= names
    assert not {"training selector", "training kd"} & names, "the recipe has them"


def test_a_wrong_matrix_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, words in (
        ("benchmarks: {main: {policies: [greedy], item: 3}}", "benchmarks.main.item: extra inputs are not permitted"),
        ("trainings: {kd: {objective: kd, shards: nowhere}}", "there is no collection nowhere"),
        ("runs: []", "runs: extra inputs are not permitted"),
        ("a: [", "not valid YAML"),
    ):
        (tmp_path / "matrix.yaml").write_text(text)
        options = [
            "--recipe",
            str(RECIPE),
            "--output",
            str(tmp_path / "out"),
            "--matrix",
            str(tmp_path / "matrix.yaml"),
        ]
        assert main(options) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1
    assert main([*options[:4], "--only", "A99"]) == 2
    assert "there is no such table or figure; there are 1, 2, 3, A1" in capsys.readouterr().err
    assert main([*options[:4], "--list", "--only", "A15"]) == 0
    listed = capsys.readouterr().out
    assert [line.partition("  ")[0] for line in listed.splitlines()[:4]] == [
        *("collection calibration", "collection train", "training selector", "benchmark budgets"),
    ]
    assert not (tmp_path / "out").exists()


def test_the_matrix_that_ships_names_what_the_tables_read() -> None:
    matrix = load_matrix()
    for spec in SPECS:
        assert all(part in matrix.benchmarks or part in matrix.collections for part in spec.reads), spec.name
    named = {policy for part in matrix.benchmarks.values() for policy in part.policies}
    for spec in SPECS:
        asked = {one for row in published(spec.name) for one in policies_in(row.policy) if one}
        assert asked <= named, f"{spec.name}: {sorted(asked - named)}"


def test_distils_texts_are_those_of_collect_teacher(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, ["distil.two_stage.top=6"])
    runs = Runs(given(recipe, tmp_path))
    collected = runs._collecting(Run("collection", runs.given.matrix.trainings["distil"].shards))
    assert collected == recipe.by_teacher()


def test_s2ts_texts_are_collected_behind_the_calibration_prompts_and_all_others_are_the_slms(tmp_path: Path) -> None:
    runs = Runs(given(load_recipe(RECIPE, ["collect.writer=s2t"]), tmp_path))
    train, states = Run("collection", "train"), Run("collection", "states", "embedded")
    folder = str((tmp_path / "collections" / "calibration").resolve())
    collected = runs._collecting(train)
    assert (collected.collect.writer, collected.trigger.calibration) == ("s2t", folder)
    assert {runs._collecting(run).collect.writer for run in (states, CALIBRATION)} == {"slm"}
    assert runs.why_not(train) == "the collection calibration is not there"
    assert runs.why_not(states) is runs.why_not(CALIBRATION) is None
    assert [run.name for run in runs.needed(["train"])] == ["collection calibration", "collection train"]
    own = Runs(given(load_recipe(RECIPE, ["collect.writer=s2t", "trigger.threshold=0.1"]), tmp_path))
    assert own.why_not(train) is None
    slm = Runs(given(load_recipe(RECIPE, ["collect.writer=slm"]), tmp_path))
    assert [run.name for run in slm.needed(["train"])] == ["collection train"]


def test_the_papers_values_agree_from_table_to_table() -> None:
    """Values that were read from a text: where two tables have the same figure it is the same here."""

    def values(table: str, metric: str = "accuracy", slm: str = "1.5B") -> dict[tuple[str, str], float | None]:
        return {(r.task, r.policy): r.value for r in published(table) if (r.metric, r.slm) == (metric, slm)}

    third, first = values("A3"), values("1")
    for table in ("A4", "A10", "A11", "A12"):
        shared = {key: value for key, value in values(table).items() if key in third}
        assert shared, table
        different = {key for key, value in shared.items() if third[key] != value}
        # Table A11's MMLU-Pro is of another sample than Table A3's.
        assert different <= {("mmlu_pro", "s2t-k8@0.01")}, table
    assert third["math500", "s2t-k8@0.01"] == first["math500", "s2t"] == values("A15")["math500", "s2t-t1-p1-k8@0.01"]
    for metric in ("tokens", "seconds"):
        assert values("3", metric).items() <= values("A13", metric).items()
    for metric in ("Agree@1", "Spearman", "SLM on sel.", "LLM on sel.", "Score on sel."):
        assert values("2", metric).items() <= values("A9", metric).items()
    for metric in ("S2T-Local", "FT Greedy", "Agree@1"):
        assert {key: values("A1", metric)[key] for key in values("A2", metric)} == values("A2", metric)


@pytest.mark.slow
def test_a_small_matrix_runs_from_nothing_and_is_not_run_again(ray_cluster: str, tmp_path: Path) -> None:
    """Collections, a benchmark and its audit on the embedded pair, with the commands' own code."""
    (tmp_path / "matrix.yaml").write_text(
        "collections: {calibration: {of: calibration}, states: {of: tasks}}\n"
        "benchmarks: {main: {policies: [greedy, takeover, s2t, s2t-t0.6-p0.7, unheard-of], audit: true}}\n"
    )
    recipe = load_recipe(RECIPE, ["calibration.prompts=40", "collect.max_new_tokens=96", "benchmark.max_new_tokens=96"])
    small = given(recipe, tmp_path / "out", tmp_path / "matrix.yaml", items=8)
    assert paper(small) == 0
    first = pd.read_csv(small.output / "tables" / "table-1.csv").set_index(["task", "policy"])
    assert first.loc[[("embedded", name) for name in ("greedy", "takeover", "s2t")], "ours"].notna().all()
    assert "no policy unheard-of with this recipe" in first.loc[("embedded", "unheard-of"), "left open"]
    errors = pd.read_csv(small.output / "tables" / "figure-eq12.csv").groupby("policy").last()
    assert errors.loc["takeover", "hit"] < errors.loc["greedy", "hit"], "the teacher's own token is no error"
    assert errors.loc["takeover", "selection"] == 0
    split = pd.read_csv(small.output / "tables" / "figure-first-wrong.csv").set_index("policy")
    counts = first["ours"].loc["embedded"]
    for policy in ("takeover", "s2t"):
        row = split.loc[policy]
        assert row["read"] == row["wrong"] == row["at_triggered"] + row["elsewhere"] + row["nowhere"]
        assert row["wrong"] <= round(8 * (1 - counts[policy] / 100))
    results = small.output / "benchmarks" / "main" / RESULTS
    written = results.stat().st_mtime_ns, (results.parent / "audited.parquet").stat().st_mtime_ns
    assert paper(small) == 0
    assert (results.stat().st_mtime_ns, (results.parent / "audited.parquet").stat().st_mtime_ns) == written


def test_evidence_says_why_a_figure_is_not_there(job: Given) -> None:
    record(job)
    evidence = Evidence(Runs(job))
    assert evidence.measure("accuracy", "embedded", "maj@8", ("main",)) == "the matrix names no maj@8 in main"
    assert evidence.measure("seconds", "embedded", "greedy", ("latency",)) == "the matrix has no benchmark latency"
    assert evidence.measure("S2T-Local", "embedded", "s2t-local:same", ("sweep",)) == "the benchmark sweep has not run"
    together = "s2t-local and s2t-local:seed-1"
    for metric in ("accuracy", "deviation"):
        assert evidence.measure(metric, "embedded", together, ("main",)) == f"the matrix names no {together} in main"
    relative = evidence.measure("tokens", "embedded", "s2t-local vs takeover", ("main",))
    assert getattr(relative, "value", None) == 0.0
