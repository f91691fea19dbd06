"""The benchmark job over real HTTP and real Ray Data, against a server that counts, refuses and hangs up."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from benchmark_jobs import POLICIES, job, run
from made_up import calibration, provenance
from processes import ctrl_c, end, start, wait_until
from stub_endpoint import Stub

from pipelines.benchmark.__main__ import main
from pipelines.benchmark.answer_log import read_answers
from pipelines.benchmark.endpoint import EndpointError, served_models
from pipelines.benchmark.job import Options, _engines, benchmark
from pipelines.benchmark.questions import QuestionError, Row, check_splits, load_items, plan, tight_limits
from pipelines.data.layout import RESULTS
from pipelines.results.summary import read_results, summarise
from pipelines.tasks import Item, Task
from pipelines.tasks.splits import fingerprint
from s2t_models.hosting import host
from s2t_models.policies import PolicyError
from s2t_models.recipe import load_recipe
from serving import app, cluster
from serving.store import EXPERIMENT

REPOSITORY = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("quick")


def test_every_question_is_asked_once_and_graded(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path
) -> None:
    frame = run(job(recipe_path), tmp_path / "out", stub)
    assert len(frame) == len(POLICIES) * 2 * 24
    assert set(stub.asked.values()) == {1}
    questions = {json.dumps(body["messages"]) for body in stub.bodies}
    assert len(questions) == 24
    for summary in summarise(frame):
        right = [stub.right(summary.policy, json.loads(text)[-1]["content"]) for text in questions]
        assert summary.accuracy == pytest.approx(sum(right) / 24)
        assert summary.correct + summary.wrong + summary.truncated + summary.errored == summary.rows == 48
        assert (summary.teacher_prefill > 0) is (summary.policy in ("s2t", "llm"))
    voted = frame[frame["policy"] == "maj@8"]
    assert (voted["samples"].map(len) == 3).all()
    assert (tmp_path / "out" / "tables.md").read_text().count("maj@8") == 2
    assert len(list((tmp_path / "out" / "figures").glob("*.png"))) >= 4


def test_an_endpoint_is_asked_with_the_key_of_the_environment(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("benchmark.policies=[greedy]", "benchmark.items=2", "benchmark.seeds=[0]")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run(job(recipe_path, *few), tmp_path / "without", stub)
    assert stub.keys == {None}
    stub.keys.clear()
    monkeypatch.setenv("OPENAI_API_KEY", "correct-horse-battery")
    run(job(recipe_path, *few), tmp_path / "with", stub)
    assert stub.keys == {"Bearer correct-horse-battery"}
    kept = [path.read_bytes() for path in (tmp_path / "with").rglob("*") if path.is_file()]
    assert kept
    assert not any(b"correct-horse" in content for content in kept)


def test_a_second_run_asks_nothing_and_says_the_same(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path
) -> None:
    first = run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)
    asked = stub.asked.total()
    assert run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub).equals(first)
    assert stub.asked.total() == asked
    more = run(job(recipe_path, "benchmark.policies=[greedy,llm]"), tmp_path / "out", stub)
    assert stub.asked.total() == 2 * asked, "only the new policy is asked"
    assert more[more["policy"] == "greedy"].equals(first)
    stub.weights = "w2"
    run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)
    assert stub.asked.total() == 3 * asked, "other weights, other answers"


@pytest.mark.slow
def test_a_job_in_which_every_row_errored_ends_with_1_and_the_reason(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["--recipe", str(recipe_path), "--output", str(output), "--endpoint", stub.url, "--policies", "greedy"]
    command += ["--items", "6", "--set", "collect.prompts=50", "--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    template = {"error": {"message": "messages: the chat template refuses\nthem \ud83d"}}
    stub.fault = lambda body, before: (400, template, {})
    assert main(command) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (
        "benchmark: 6 of 6 rows errored (the first: 400: messages: the chat template refuses them \ufffd); "
        f"refusals are kept in {output / 'answers'}, delete it to ask anew"
    )
    assert not said.out
    stub.fault = lambda body, before: (200, b"<html>", {})
    shutil.rmtree(output / "answers")
    assert main(command) == 1
    assert (
        "6 of 6 rows errored (the first: the reply is not a chat completion: not JSON: <html>)"
        in capsys.readouterr().err
    )
    stub.fault = lambda body, before: None
    assert main(command) == 0, "what got no answer is asked again"


def test_ctrl_c_ends_the_job_in_one_line(stub: Stub, recipe_path: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    stub.delay_s = 0.2
    process = start(
        *("-m", "pipelines.benchmark", "--recipe", str(recipe_path), "--output", str(output), "--endpoint", stub.url),
        *("--policies", "greedy", "--items", "400", "--set", "collect.prompts=50", "--set", "benchmark.concurrency=2"),
        *("--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}"),
    )
    wait_until(lambda: bool(read_answers(output / "answers")), process)
    ctrl_c(process)
    status, out, err = end(process)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == "benchmark: stopped; the same command goes on from here"
    assert all(line.startswith("benchmark: ") for line in err.splitlines()), err


def test_a_dead_endpoint_ends_the_job_in_one_line(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--recipe",
        str(recipe_path),
        "--output",
        str(tmp_path / "out"),
        "--policies",
        "greedy",
        "--items",
        "30",
    ]
    assert main([*arguments, "--endpoint", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--endpoint", stub.url, "--policies", "nonesuch"]) == 2
    assert "does not serve nonesuch" in capsys.readouterr().err


def test_an_endpoint_that_goes_away_ends_the_job_and_its_answers_are_kept(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path
) -> None:
    def fault(body: dict, before: int) -> None:
        stub.down = stub.answered.total() >= 20
        if stub.down:
            raise ConnectionError

    stub.fault = fault
    recipe = job(recipe_path, "benchmark.policies=[greedy]", "benchmark.concurrency=4")
    with pytest.raises(EndpointError, match="stopped answering"):
        run(recipe, tmp_path / "out", stub)
    assert 20 <= len(read_answers(tmp_path / "out" / "answers")) < 48
    stub.fault, stub.down = lambda body, before: None, False
    assert len(run(recipe, tmp_path / "out", stub)) == 48
    assert set(stub.answered.values()) == {1}


def test_killed_at_any_point_it_goes_on_without_asking_again(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.benchmark", "--recipe", str(recipe_path), "--output", str(output)]
    command += ["--policies", ",".join(POLICIES), "--items", "24", "--seeds", "0,1", "--set", "collect.prompts=50"]
    command += ["--set", "benchmark.concurrency=4", "--endpoint", stub.url]
    command += ["--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    stub.delay_s = 0.1
    # On a cluster of its own, as a user starts it; the kill takes that down too.
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        while len(read_answers(output / "answers")) < 40:
            assert process.poll() is None, "the job ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until_quiet(stub)
    kept = read_answers(output / "answers")
    assert 40 <= len(kept) < len(POLICIES) * 48, "it was killed in the middle"
    asked_before = dict(stub.asked)
    stub.delay_s = 0.0
    frame = run(job(recipe_path, "benchmark.concurrency=4"), output, stub)
    answered_before = len(set(frame["key"]) & kept.keys())
    assert answered_before == len(kept), "every answer kept is one of the job's"
    assert stub.asked.total() - sum(asked_before.values()) == len(frame) - len(kept), "only the rest was asked"
    fresh = run(job(recipe_path), tmp_path / "fresh", stub)
    timing = ["seconds", "client_seconds"]
    assert frame.drop(columns=timing).equals(fresh.drop(columns=timing))


def wait_until_quiet(stub: Stub) -> None:
    """Until nothing is asked any more: Ray has noticed that the job is gone."""
    asked = -1
    while asked != stub.asked.total():
        asked = stub.asked.total()
        time.sleep(1.5)


def test_the_cache_key_holds_all_that_an_answer_depends_on(
    recipe_path: Path, items: list[tuple[Task, list[Item]]]
) -> None:
    (row, *_) = plan(job(recipe_path), items, {policy: {} for policy in POLICIES}, 1)

    def changed(**parts: object) -> str:
        return Row(**({name: getattr(row, name) for name in row.__dataclass_fields__} | parts)).key  # type: ignore[arg-type]

    others = [
        changed(policy="other"),
        changed(settings={"weights": "b"}),
        changed(seed=7),
        changed(repeat=1),
        changed(item=items[0][1][1]),
    ]
    assert len({row.key, *others}) == 6
    assert changed() == row.key


def test_every_item_has_noise_of_its_own_shared_by_the_policies(
    recipe_path: Path, items: list[tuple[Task, list[Item]]]
) -> None:
    rows = plan(job(recipe_path), items, {policy: {} for policy in POLICIES}, 2)
    seeds = {(row.item.uid, row.seed, row.repeat): row.request_seed for row in rows}
    assert len(set(seeds.values())) == len(seeds) == 24 * 2 * 2
    assert all(seeds[row.item.uid, row.seed, row.repeat] == row.request_seed for row in rows)


def test_test_rows_among_the_training_rows_are_refused(recipe_path: Path) -> None:
    recipe = job(recipe_path, "benchmark.task=[embedded-train]", "collect.prompts=4000")
    with pytest.raises(QuestionError, match=r"training \(embedded-train\) and test \(embedded-train\) share"):
        check_splits(recipe, load_items(recipe, None), None)


def test_rows_that_anything_of_the_recipe_was_made_with_are_refused(recipe_path: Path, tmp_path: Path) -> None:
    hashes = sorted(fingerprint(load_items(job(recipe_path), None)[0][1][:2]))
    provenance(rows={"training (file:mine.jsonl)": hashes}).write(tmp_path)
    (tmp_path / "thresholds.json").write_text(calibration(task="mine", rows=hashes).model_dump_json())
    for setting, made_with in (
        (f"checkpoints.kd={tmp_path}", r"training \(file:mine.jsonl\)"),
        (f"router.path={tmp_path}", r"training \(file:mine.jsonl\)"),
        (f"artifacts.new={tmp_path}", r"training \(file:mine.jsonl\)"),
        (f"routers.new={tmp_path}", r"training \(file:mine.jsonl\)"),
        (f"tah={tmp_path}", r"training \(file:mine.jsonl\)"),
        (f"trigger.calibration={tmp_path}", r"calibration \(mine\)"),
    ):
        recipe = job(recipe_path, setting)
        with pytest.raises(QuestionError, match=rf"{made_with} and test \(embedded\) share 2 rows"):
            check_splits(recipe, load_items(recipe, None), None)


@pytest.mark.slow
def test_a_job_serves_beside_what_is_served_already(
    endpoint: str, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray import serve

    port = endpoint.removesuffix("/v1").rpartition(":")[2]
    few = ["--set", "slm.num_cpus=0.1", "--set", f"serving.port={port}", "--items", "3", "--seeds", "0"]
    few += ["--tracking", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    command = ["--recipe", str(recipe_path), "--output", str(tmp_path / "out"), *few]
    assert main([*command, "--policies", "grredy"]) == 2
    assert capsys.readouterr().err.startswith("benchmark: no policy named 'grredy'")
    assert main([*command, "--policies", "greedy"]) == 0
    assert "greedy" in capsys.readouterr().out
    assert set(serve.status().applications) == {app.NAME}
    assert served_models(endpoint, ["greedy"]), "the endpoint of before still answers"


def test_bad_calls_end_in_one_line(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out")]
    for arguments, words in (
        (["--recipe", str(tmp_path / "none.yaml")], "no such recipe file"),
        (["--recipe", str(recipe_path), "--task", "nonesuch"], "there is no task 'nonesuch'"),
        (["--recipe", str(recipe_path), "--set", "benchmark.seed=1"], "unknown key benchmark.seed"),
        (["--recipe", str(recipe_path), "--items", "-1"], "benchmark.items"),
        (["--recipe", str(recipe_path), "--seeds", ""], "benchmark.seeds"),
        (["--recipe", str(recipe_path), "--tracking", "nonesuch://x"], "MLflow store nonesuch://x"),
        (["--recipe", str(recipe_path), "--output", str(recipe_path)], "not a folder to write to"),
    ):
        assert main([*output, *arguments]) == 2
        message = capsys.readouterr().err
        assert words in message
        assert message.count("\n") == 1


@pytest.mark.parametrize("policy", ["greedy", "maj@8", "s2t", "s2t-local,s2t-local:other", "kd", "llm"])
def test_the_served_pair_answers_the_embedded_task(
    endpoint: str, recipe_path: Path, untrained_artifact: Path, other_artifact: Path, tmp_path: Path, policy: str
) -> None:
    recipe = job(
        recipe_path,
        f"artifact={untrained_artifact}",
        f"artifacts.other={other_artifact}",
        "checkpoints.kd=embedded:slm",
        f"benchmark.policies=[{policy}]",
        "benchmark.seeds=[0]",
        "benchmark.items=6",
    )
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tables, _ = benchmark(recipe, tmp_path / "out", Options(endpoint=endpoint, tracking=store))
    frame = read_results(tmp_path / "out" / RESULTS)[0]
    runs = mlflow.search_runs(experiment_names=[EXPERIMENT])["tags.mlflow.runName"]
    assert {f"{name} on embedded" for name in policy.split(",")} < set(runs)
    if policy == "s2t-local,s2t-local:other":
        assert re.search(r"^\| against s2t-local .*\n.*\n\| s2t-local:other ", tables, re.MULTILINE)
        engines = frame.groupby("policy")["models"].first().map(json.loads).map(list)
        assert engines.to_dict() == {name: [name] for name in policy.split(",")}
    assert frame["error"].isna().all()
    assert (frame["tokens"] > 0).all()
    assert all(json.loads(models) for models in frame["models"])
    assert (frame["samples"].map(len) == (8 if policy == "maj@8" else 0)).all()


def test_a_job_serves_the_engines_its_policies_call_and_no_others(
    recipe_path: Path, untrained_artifact: Path, other_artifact: Path
):
    beside = host(load_recipe(recipe_path, [f"artifact={untrained_artifact}", f"artifacts.new={other_artifact}"]))
    assert _engines(beside, ["s2t-local", "s2t-local@0.1:new"]) == {"s2t-local", "s2t-local:new"}
    hosting = host(load_recipe(recipe_path, [f"artifact={untrained_artifact}"]))
    assert _engines(hosting, ["greedy", "maj@3"]) == {"slm"}
    assert _engines(hosting, ["s2t-local"]) == {"s2t-local"}
    assert _engines(hosting, ["greedy", "s2t"]) == {"slm", "teacher"}
    assert _engines(hosting, ["s2t-local-kl"]) == {"s2t-local", "teacher"}
    with pytest.raises(PolicyError, match="no policy named 'grredy'"):
        _engines(hosting, ["grredy"])
    with pytest.raises(PolicyError, match="kd needs the engine kd, which is not served here"):
        _engines(hosting, ["kd"])
    assert set(hosting.engines) == {"slm", "teacher", "s2t-local"}
    assert set(hosting.only({"slm"}).engines) == {"slm"}
    assert app.cpus(hosting.only({"slm"})) == hosting.recipe.slm.num_cpus


@pytest.mark.parametrize(("each", "whole"), [(1.0, cluster.LOCAL_CPUS), (6.5, 13.0)])
def test_a_cluster_that_the_job_starts_here_holds_its_engines(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: float, whole: float
) -> None:
    def start(cpus: float = 0.0) -> bool:
        raise cluster.ClusterError(f"a cluster of {cpus:g} CPUs")

    monkeypatch.setattr(cluster, "start", start)
    settings = ["benchmark.policies=[greedy,llm]", f"slm.num_cpus={each}", f"teacher.num_cpus={each}"]
    with pytest.raises(cluster.ClusterError, match=f"a cluster of {whole:g} CPUs"):
        benchmark(load_recipe(recipe_path, settings), tmp_path / "out", Options())


def test_a_limit_that_a_context_does_not_hold_beside_a_prompt_is_told_before_a_question() -> None:
    task = Task("t", (), lambda tables: [], max_new_tokens=4096)
    items = [Item(f"t/{i}", [{"role": "user", "content": "word " * 80}], "1") for i in range(3)]

    def lines(**contexts: int) -> list[str]:
        return tight_limits(
            [Row(task, item, name, 0, 0, {"context": size}) for item in items for name, size in contexts.items()]
        )

    assert not lines(greedy=4196)
    (line,) = lines(greedy=8192, s2t=4195)
    assert "limit of 4096 tokens and a prompt of about 100 exceed the context of s2t, 4195" in line
    assert "to 4196 or more, or benchmark.max_new_tokens to 4095 or less" in line
    assert not tight_limits([Row(task, items[0], "greedy", 0, 0, {})]), "an endpoint need not say"
