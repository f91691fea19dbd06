"""Collect on a real Ray cluster and the embedded pair: exact labels, resume after SIGKILL, errors as rows."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from label_reference import assert_labels_equal_brute_force
from processes import ctrl_c, end, start, wait_until

from pipelines.collect import publish
from pipelines.collect.__main__ import main
from pipelines.collect.actors import Labels, Rollouts, propose_steps
from pipelines.collect.job import collect
from pipelines.collect.prompts import Prompt, PromptError, from_file, from_task, rows
from pipelines.collect.schemas import PROMPT, ROLLOUT
from pipelines.data.shards import read_shards
from pipelines.data.sink import committed
from pipelines.tasks import task
from pipelines.tasks.splits import fingerprint
from s2t_models import loading
from s2t_models.embedded import generator
from s2t_models.hosting import Hosted, pair
from s2t_models.locks import locked
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.reserved import reserved_rows
from serving.store import use_store

GOOD = 44
SETTINGS = [
    "collect.writer=slm",
    "collect.max_new_tokens=120",
    "collect.rollout.batch=4",
    "collect.label.batch=4",
    "collect.rollout.num_cpus=0.5",
    "collect.label.num_cpus=0.5",
]


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path, SETTINGS)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good prompts with an empty one and one far over the context among them."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"uid": problem.uid, "prompt": problem.question} for problem in generator.problems("train", GOOD)
    ]
    lines.insert(3, {"uid": "empty", "prompt": " "})
    lines.insert(5, {"uid": "long", "messages": [{"role": "user", "content": "one two three " * 5000}]})
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(scope="module")
def collection(ray_cluster: None, recipe: Recipe, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("collection")
    collect(recipe, output, prompts)
    return output


def _main(recipe_path: Path, output: Path, prompts: Path, *settings: str) -> int:
    overrides = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
    return main(["--recipe", str(recipe_path), "--output", str(output), "--prompts", str(prompts), *overrides])


def _whole(collection: Path) -> list[dict[str, Any]]:
    return [row for row in read_shards(collection)[0].to_pylist() if row["error"] is None]


def test_one_row_a_prompt_in_their_order(collection: Path, prompts: Path) -> None:
    table, _ = read_shards(collection)
    assert table["uid"].to_pylist() == [prompt.uid for prompt in from_file(prompts)]
    assert not (collection / "work").exists()


def test_bad_prompts_become_rows_with_an_error(collection: Path) -> None:
    errors = {row["uid"]: row["error"] for row in read_shards(collection)[0].to_pylist() if row["error"]}
    assert set(errors) == {"empty", "long"}
    assert errors["empty"].startswith("empty prompt:")
    assert errors["long"].startswith("too long:")
    summary = json.loads((collection / "collect.json").read_text())
    assert summary["rows"] == GOOD + 2
    assert summary["errors"] == {"empty prompt": 1, "too long": 1}
    assert summary["first_error"] == errors["empty"]


def test_half_the_rows_are_sampled(collection: Path) -> None:
    temperatures = read_shards(collection)[0]["temperature"].to_pylist()
    assert sorted(set(temperatures)) == [0.0, 0.7]
    assert temperatures.count(0.7) == len(temperatures) // 2


def test_labels_equal_brute_force(collection: Path, recipe: Recipe) -> None:
    assert_labels_equal_brute_force(_whole(collection)[:6], recipe)


def test_kept_steps_are_the_top_ones_of_the_whole_collection(collection: Path, recipe: Recipe) -> None:
    whole = _whole(collection)
    kl = {(row["uid"], step): value for row in whole for step, value in enumerate(row["kl_T"])}
    by_kl = {(row["uid"], step["step"]) for row in whole for step in row["kept"] if step["by_kl"]}
    random = {(row["uid"], step["step"]) for row in whole for step in row["kept"] if not step["by_kl"]}
    assert len(by_kl) == round(recipe.collect.steps * len(kl))
    assert min(kl[step] for step in by_kl) >= max(value for step, value in kl.items() if step not in by_kl)
    assert len(random) / (len(kl) - len(by_kl)) == pytest.approx(recipe.collect.random_steps, rel=0.3)
    shares = [sum(step["by_kl"] for step in row["kept"]) / len(row["kl_T"]) for row in whole]
    assert max(shares) > 1.5 * min(shares)  # not a tenth of each trajectory


def test_thresholds_trigger_their_budgets(collection: Path) -> None:
    thresholds = json.loads((collection / "thresholds.json").read_text())
    _, metadata = read_shards(collection)
    assert thresholds["slm"] == metadata["s2t.slm"]
    for name, column in (("kl", "kl_T"), ("entropy", "entropy_T")):
        values = np.concatenate([row[column] for row in _whole(collection)])
        assert list(thresholds[name]) == ["0.01", "0.02", "0.05", "0.1", "0.2"]
        for budget, threshold in thresholds[name].items():
            assert (values >= threshold).mean() == pytest.approx(float(budget), abs=2 / len(values))


@pytest.mark.slow  # one that is killed in an object store is in the default tests
def test_killed_and_started_again_gives_the_same_rows(
    collection: Path,
    recipe: Recipe,
    recipe_path: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    overrides = [part for setting in SETTINGS for part in ("--set", setting)]
    job = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipelines.collect", "--recipe", str(recipe_path)),
            *("--output", str(tmp_path), "--prompts", str(prompts), *overrides),
        ],
        cwd=recipe_path.parents[2],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    labelled, checkpoint = tmp_path / "work" / "labelled", tmp_path / "work" / "checkpoint"
    while not committed(labelled, checkpoint):
        assert job.poll() is None, "the collection ended before it could be killed"
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.wait()
    first = set(committed(labelled, checkpoint))
    assert not (tmp_path / "shards").exists()

    used: list[Path] = []

    def spy(files: list[Path], *arguments: Any, **named: Any) -> dict[str, Any]:
        used.extend(files)
        return original(files, *arguments, **named)

    original = publish.publish
    monkeypatch.setattr("pipelines.collect.job.publish", spy)
    collect(recipe, tmp_path, prompts)
    assert first < set(used)  # what was done was not done again, and something was left to do

    exact = (
        "uid",
        "prompt",
        "prompt_ids",
        "output_ids",
        "seed",
        "temperature",
        "finish",
        "teacher_argmax_T",
        "error",
    )
    there, again = (read_shards(folder)[0] for folder in (collection, tmp_path))
    for column in exact:
        assert there[column].to_pylist() == again[column].to_pylist()
    for one, other in zip(_whole(collection), _whole(tmp_path), strict=True):
        # Batches fall differently, so the last bits of a float may.
        np.testing.assert_allclose(one["kl_T"], other["kl_T"], rtol=1e-3, atol=1e-4)
        assert [step["step"] for step in one["kept"]] == [step["step"] for step in other["kept"]]


@pytest.mark.slow  # a benchmark and a served recipe that are stopped are in the default tests
def test_ctrl_c_ends_the_job_in_one_line(ray_cluster: None, recipe_path: Path, prompts: Path, tmp_path: Path) -> None:
    import ray

    overrides = [part for setting in SETTINGS for part in ("--set", setting)]
    process = start(
        *(
            "-m",
            "pipelines.collect",
            "--recipe",
            str(recipe_path),
            "--output",
            str(tmp_path),
            "--prompts",
            str(prompts),
        ),
        *overrides,
        RAY_ADDRESS=ray.get_runtime_context().gcs_address,
    )
    work = tmp_path / "work"
    wait_until(lambda: bool(committed(work / "labelled", work / "checkpoint")), process)
    ctrl_c(process)
    status, out, err = end(process)
    assert status == 130
    assert "Traceback" not in out, "a warning of the cluster's, from before, may be there"
    assert err.splitlines()[-1] == "collect: stopped; the same command goes on from here"
    assert all(line.startswith("collect: ") for line in err.splitlines()), err


def test_finished_collection_is_left_alone(
    collection: Path, recipe_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [(path, path.stat().st_mtime_ns) for path in sorted((collection / "shards").iterdir())]
    assert _main(recipe_path, collection, prompts, "collect.label.actors=50", "serving.port=9000") == 0
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted((collection / "shards").iterdir())]
    said = capsys.readouterr()
    assert f"{GOOD + 2} rows" in said.out
    assert said.err.startswith(f"collect: 2 of {GOOD + 2} rows errored (the first: empty prompt: ")


def test_a_store_that_is_not_there_is_said_before_any_work_and_costs_no_finished_row(
    collection: Path,
    recipe_path: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr("pipelines.collect.job._run", lambda *_: pytest.fail("it began"))
    assert _main(recipe_path, tmp_path / "new", prompts) == 2
    assert capsys.readouterr().err.startswith("collect: MLflow store http://127.0.0.1:9: cannot be used: ")
    assert _main(recipe_path, collection, prompts) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0].startswith("not logged to MLflow: MLflow store http://127.0.0.1:9: cannot be used")
    assert f"{GOOD + 2} rows" in said.out


def test_a_collection_in_which_every_row_errored_ends_with_1_and_the_reason(
    ray_cluster: None, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"uid": "a", "prompt": " "}\n{"uid": "b", "prompt": " "}\n')
    assert _main(recipe_path, tmp_path / "out", tmp_path / "prompts.jsonl") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("collect: all 2 rows errored, and there is nothing to publish (the first: empty prompt: ")
    assert line.endswith(f"delete {tmp_path / 'out' / 'work'} to collect again")


def test_a_finished_collection_is_one_run(collection: Path, mlflow_store: str) -> None:
    import mlflow

    use_store()
    runs = mlflow.search_runs(filter_string="tags.`s2t.stage` = 'collect'", output_format="list")
    (run,) = [run for run in runs if run.data.params["folder"] == str(collection.resolve())]
    summary = json.loads((collection / "collect.json").read_text())
    assert run.data.metrics["hit_1"] == summary["hit"]["1"]
    assert run.data.metrics["errors"] == 2
    assert run.data.metrics["teacher_prefill"] == sum(
        len(row["prompt_ids"] + row["output_ids"]) for row in _whole(collection)
    )


def test_other_recipe_into_the_same_folder_is_refused(
    collection: Path, recipe_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(recipe_path, collection, prompts, "collect.k=8", "seed=1") == 2
    message = capsys.readouterr().err
    assert "other settings (collect.k, seed, prompts)" in message
    assert message.count("\n") == 1


def test_other_pair_into_the_same_folder_is_refused(
    collection: Path, recipe_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(recipe_path, collection, prompts, "teacher.path=embedded:slm") == 2
    assert "other settings (teacher weights)" in capsys.readouterr().err


def test_tokenizers_that_differ_are_refused(
    recipe: Recipe, recipe_path: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(loading.resolve(recipe.slm), tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    assert _main(recipe_path, tmp_path / "out", prompts, f"slm.path={tmp_path / 'other'}") == 2
    message = capsys.readouterr().err
    assert "are not the same: they differ in merges;" in message
    assert message.count("\n") == 1


def test_a_template_without_a_system_role_costs_no_row_and_other_refusals_one_each(recipe: Recipe) -> None:
    rollouts = Rollouts(recipe, pair(recipe)["slm"])
    rollouts.tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% if m['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}{{ m['content'] }}{% endfor %}="
    )
    system, user = {"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 3"}
    chats = [[system, user], [{"role": "user", "content": "no"}], [{"role": "user", "content": "half \ud83d"}]]
    table = rollouts(
        pa.Table.from_pylist(
            [
                {"uid": str(i), "messages": json.dumps(chat), "questions": [], "seed": 1, "temperature": 0.0}
                for i, chat in enumerate(chats)
            ],
            PROMPT,
        )
    )
    rollouts.engine.close()  # type: ignore[attr-defined]
    assert table["prompt"][0].as_py() == "Add.\n\n2 + 3="
    assert table["error"].to_pylist() == [
        None,
        "the chat template refuses the messages: not this",
        r"not text: a lone surrogate, '\ud83d', at character 5",
    ]


def test_more_actors_than_the_cluster_has_fails_at_once(
    ray_cluster: None, recipe_path: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(recipe_path, tmp_path, prompts, "collect.label.actors=50") == 2
    message = capsys.readouterr().err
    assert "needs 27.5 CPUs and the cluster has 8" in message
    assert message.count("\n") == 1


def test_second_job_in_the_same_folder_is_refused(
    recipe_path: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with locked(tmp_path):
        assert _main(recipe_path, tmp_path, prompts) == 2
    assert "another job is at work there" in capsys.readouterr().err


def test_failing_rows_cost_no_other_row(recipe: Recipe) -> None:
    prompts = [
        Prompt(problem.uid, [{"role": "user", "content": problem.question}])
        for problem in generator.problems("train", 4)
    ]
    rollouts = Rollouts(recipe, pair(recipe)["slm"])
    generate = rollouts.engine.generate
    bad = rows(prompts, recipe)[2]["seed"]

    async def broken(prefix: list[int], sampling: Any) -> Any:
        if sampling.seed == bad:
            raise RuntimeError("the model\nfell over")
        return await generate(prefix, sampling)

    rollouts.engine.generate = broken  # type: ignore[method-assign]
    rolled = rollouts(pa.Table.from_pylist(rows(prompts, recipe), PROMPT))
    assert rolled.schema.equals(ROLLOUT)
    assert rolled["error"].to_pylist() == [None, None, "failed: RuntimeError: the model fell over", None]

    lengths = [len(row["prompt_ids"]) + len(row["output_ids"]) for row in rolled.to_pylist() if row["error"] is None]
    narrow = recipe.teacher.model_copy(update={"context": max(lengths) - 1})
    labelled = Labels(recipe, Hosted("teacher", narrow, reserved_rows(recipe)))(rolled).to_pylist()
    assert labelled[2]["error"] == "failed: RuntimeError: the model fell over"
    assert [row["error"] or "" for row in labelled].count("") >= 1
    assert any((row["error"] or "").startswith("too long:") for row in labelled)
    for row in labelled:
        assert (row["kl_T"] is None) == (row["error"] is not None)


def test_candidates_are_draws_without_replacement() -> None:
    """Against the probability of every ordered pair, p_i p_j / (1 - p_i)."""
    p_N = np.array([0.5, 0.3, 0.15, 0.05])
    drawn_TK = propose_steps(np.tile(np.log(p_N), (40_000, 1)), 2, "multinomial", seed=1)
    for i in range(4):
        for j in range(i + 1, 4):
            expected = p_N[i] * p_N[j] / (1 - p_N[i]) + p_N[j] * p_N[i] / (1 - p_N[j])
            assert (drawn_TK == [i, j]).all(-1).mean() == pytest.approx(expected, abs=0.01)
    assert propose_steps(np.tile(np.log(p_N), (2, 1)), 3, "top_k", seed=1).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"uid": "a", "prompt": "x"}\n{"uid": "b"', ":2: expected"),
        ('{"uid": "a"}', ":1: expected"),
        ('{"uid": "a", "prompt": 3}', ":1: expected"),
        ("[1]", ":1: expected"),
        ('{"uid": "a", "prompt": "x"}\n{"uid": "b", "prompt": "\\ud83d"}', ":2: holds half a character"),
        ('{"uid": "\\ud83d", "prompt": "x"}', ":1: holds half a character"),
        ("[" * 100_000, ":1: expected"),
        ("\n", "holds no prompts"),
    ],
)
def test_malformed_prompt_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=message):
        from_file(path)


def test_a_prompts_file_may_begin_with_a_mark_and_hold_any_character(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + '{"uid": "a", "prompt": "é \\ud83d\\ude00"}'.encode())
    assert from_file(path) == [Prompt("a", [{"role": "user", "content": "é 😀"}])]
    path.write_bytes(b'{"uid": "a", "prompt": "\xff"}')
    with pytest.raises(PromptError, match="is not UTF-8 text"):
        from_file(path)


def test_uid_that_occurs_twice_is_refused(recipe: Recipe) -> None:
    with pytest.raises(PromptError, match="'a' occurs twice"):
        rows([Prompt("a", []), Prompt("a", [])], recipe)


def test_a_line_break_inside_a_text_does_not_end_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"uid": "a", "prompt": "one\u2028two\x85three"}\n{"uid": "b", "prompt": "x"}\n')
    assert [prompt.uid for prompt in from_file(path)] == ["a", "b"]


def test_a_question_is_known_however_it_was_asked(recipe: Recipe, tmp_path: Path) -> None:
    """What keeps test rows out of training finds a task's row in a file of prompts, too."""
    (item,) = task("embedded").load()[:1]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"uid": "mine", "prompt": f" {item.question.upper()} "}) + "\n")
    (row,) = rows(from_file(path), recipe)
    assert set(row["questions"]) & fingerprint([item]).keys()
    (own,) = rows(from_task("embedded", None, recipe)[:1], recipe)
    assert own["questions"]


def test_a_task_with_fewer_prompts_than_asked_for_says_so(recipe_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = load_recipe(recipe_path, ["collect.prompts=100000"])
    assert len(from_task("embedded-hard", None, recipe)) == 500
    assert capsys.readouterr().err == "collect: embedded-hard has 500 prompts of the 100,000 asked for; all are taken\n"
