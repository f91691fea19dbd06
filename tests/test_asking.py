"""Asking an endpoint: odd replies, faults that pass and faults that stay, and the log of answers."""

from __future__ import annotations

import codecs
import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from benchmark_jobs import job, run
from stub_endpoint import Stub

from pipelines.benchmark import asking
from pipelines.benchmark.answer_log import AnswersError, read_answers
from pipelines.benchmark.endpoint import EndpointError, read_reply, served_models
from pipelines.benchmark.questions import load_items
from pipelines.results.summary import summarise
from pipelines.runtime.records import RecordLog
from serving import cluster

pytestmark = pytest.mark.usefixtures("quick")


def test_faults_that_pass_are_tried_again(ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path) -> None:
    def fault(body: dict, before: int) -> tuple[int, dict, dict[str, str]] | None:
        kind = body["seed"] % 4
        if before > 1 or kind == 0:
            return None
        if kind == 1:
            raise ConnectionError
        error = {"error": {"message": "busy"}}
        return (429, error, {"Retry-After": "0.01"}) if kind == 2 else (503, error, {})

    stub.fault = fault
    frame = run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)
    assert frame["error"].isna().all()
    assert set(stub.asked.values()) == {1, 3}
    assert set(stub.answered.values()) == {1}


def test_refusals_are_answers_and_lasting_faults_are_asked_again_next_time(
    ray_cluster: None,
    stub: Stub,
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused, broken = 0, 0

    def fault(body: dict, before: int) -> tuple[int, dict, dict[str, str]] | None:
        nonlocal refused, broken
        if body["seed"] % 3 == 0:
            refused += before == 0
            return 400, {"error": {"message": "no such thing", "code": "invalid"}}, {}
        if body["seed"] % 3 == 1:
            broken += before == 0
            return 500, {"error": {"message": "internal error"}}, {}
        return None

    stub.fault = fault
    recipe = job(recipe_path, "benchmark.policies=[greedy]")
    frame = run(recipe, tmp_path / "out", stub)
    (summary,) = summarise(frame)
    assert summary.errored == refused + broken
    assert f"{refused + broken} of 48 rows errored (the first: " in capsys.readouterr().err
    assert set(frame["error"].dropna()) == {"400: no such thing", "500 after 8 attempts: internal error"}
    assert (summary.correct + summary.wrong + summary.errored) == summary.rows
    stub.fault = lambda body, before: None
    before = dict(stub.asked)
    (again,) = summarise(run(recipe, tmp_path / "out", stub))
    assert again.errored == refused
    assert stub.asked.total() - sum(before.values()) == broken


def test_an_endpoint_that_refuses_everything_gives_no_answers(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path
) -> None:
    stub.fault = lambda body, before: (404, {"detail": "Path '/v1/chat/completions' not found"}, {})
    with pytest.raises(EndpointError, match=r"404: .*not found"):
        run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)
    assert not read_answers(tmp_path / "out" / "answers")
    stub.fault = lambda body, before: None
    assert run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)["error"].isna().all()


def test_a_prompt_near_the_context_gets_the_room_that_is_left_and_its_row_says_so(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(body: dict, before: int) -> tuple[int, dict, dict[str, str]] | None:
        if "max_tokens" in body and body["messages"][-1]["content"] in long:
            return 400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, {}
        return None

    recipe = job(recipe_path, "benchmark.policies=[greedy]")
    ((_, items),) = load_items(recipe, None)
    long = {item.question for item in items[:5]}
    stub.fault = fault
    frame = run(recipe, tmp_path / "out", stub)
    assert frame["error"].isna().all()
    assert set(frame[frame["shortened"]]["item"]) == {item.uid for item in items[:5]}
    assert (frame["limit"] == 256).all()
    assert "benchmark: 10 of 48 answers had less room" in capsys.readouterr().err
    assert "less room than their limit: greedy 10 of 48." in (tmp_path / "out" / "tables.md").read_text()


def completion(**parts: Any) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": "So \\boxed{7}."}, "finish_reason": "stop"}
    whole = {"choices": [choice], "usage": {"completion_tokens": 5}} | parts
    return json.dumps({key: value for key, value in whole.items() if value is not ...}).encode()


def message(content: Any, **parts: Any) -> bytes:
    return completion(choices=[{"message": {"content": content}, "finish_reason": "stop"} | parts])


DECISION = {
    "step": 1,
    "candidates_K": [1, 2],
    "logprobs_K": [-0.1, None],
    "scores_K": [0.5, None],
    "preferences_K": [0.5, None],
    "chosen": 1,
}
ANSWERED = {
    "null content": (message(None), ""),
    "no content": (completion(choices=[{"message": {}}]), ""),
    "no usage": (completion(usage=...), "So \\boxed{7}."),
    "null usage": (completion(usage=None), "So \\boxed{7}."),
    "null tokens": (completion(usage={"completion_tokens": None}), "So \\boxed{7}."),
    "null finish": (message("x", finish_reason=None), "x"),
    "another finish": (message("x", finish_reason="content_filter"), "x"),
    "half a character": (message("a\ud83d"), "a\ufffd"),
    "a whole one": (message("a\U0001f600"), "a\U0001f600"),
    "bytes that are no UTF-8": (message("a").replace(b'"a"', b'"a\xff"'), "a\ufffd"),
    "a mark first": (codecs.BOM_UTF8 + message("a"), "a"),
    "null s2t": (completion(s2t=None), "So \\boxed{7}."),
    "another s2t": (completion(s2t={"version": 3}), "So \\boxed{7}."),
    "decisions": (completion(s2t={"decisions": [DECISION]}), "So \\boxed{7}."),
}
ERRORED = {
    "no choice": (completion(choices=[]), "choices: List should have at least 1 item"),
    "no choices": (completion(choices=...), "choices: Field required"),
    "null choices": (completion(choices=None), "choices: Input should be a valid list"),
    "null message": (completion(choices=[{"message": None}]), "choices.0.message: Input should be"),
    "a number": (message(7), "choices.0.message.content: Input should be a valid string"),
    "parts": (message([{"type": "text", "text": "x"}]), "choices.0.message.content: Input should be a valid string"),
    "a page": (b"<html><body>Welcome\n</body>", "not JSON: <html><body>Welcome </body>"),
    "nothing": (b"", "not JSON"),
    "a list": (b"[]", "Input should be"),
    "half": (completion()[:-9], "not JSON"),
    "depth": (b"[" * 100_000, "not JSON"),
    "tokens beyond counting": (completion(usage={"completion_tokens": 10**30}), "usage.completion_tokens"),
    "tokens below nothing": (completion(usage={"completion_tokens": -1}), "usage.completion_tokens"),
    "s2t as text": (completion(s2t="yes"), "s2t: Input should be"),
    "usage as text": (completion(s2t={"usage": {"slm": "much"}}), "s2t.usage.slm: Input should be"),
    "samples as text": (completion(s2t={"samples": "x"}), "s2t.samples: Input should be"),
    "a decision of another shape": (completion(s2t={"decisions": [{"step": 1}]}), "s2t.decisions.0.candidates_K"),
    "seconds without end": (completion(s2t={"seconds": float("inf")}), "s2t.seconds"),
}


@pytest.mark.parametrize("kind", ANSWERED)
def test_a_reply_is_read_as_servers_write_it(kind: str) -> None:
    body, text = ANSWERED[kind]
    assert read_reply(body).text == text


@pytest.mark.parametrize("kind", ERRORED)
def test_a_reply_that_makes_no_sense_is_refused_with_the_reason(kind: str) -> None:
    body, reason = ERRORED[kind]
    with pytest.raises(EndpointError, match=f"the reply is not a chat completion: {re.escape(reason)}") as refused:
        read_reply(body)
    assert len(str(refused.value)) < 400


def test_no_reply_ends_the_job(
    ray_cluster: None,
    stub: Stub,
    recipe_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bodies = [*(body for body, _ in (ANSWERED | ERRORED).values()), b" " * 3 * 2**20]
    order = iter(bodies)
    assigned: dict[int, bytes] = {}
    stub.fault = lambda body, before: (200, assigned.setdefault(body["seed"], next(order, bodies[0])), {})
    monkeypatch.setattr(asking, "LONGEST_REPLY", 2**20)
    monkeypatch.setattr(asking, "Asker", _with_short_replies(asking.Asker))
    frame = run(job(recipe_path, "benchmark.policies=[greedy]"), tmp_path / "out", stub)
    errors = frame["error"].dropna()
    assert len(errors) == len(ERRORED) + 1
    assert (errors == "the reply is longer than 1 MiB").sum() == 1
    assert "a\ufffd" in set(frame["output"])
    said = capsys.readouterr().err
    assert f"benchmark: {len(errors)} of 48 rows errored (the first: the reply is" in said


def _with_short_replies(asker: type) -> type:
    """The actor has modules of its own: the limit has to be set where it runs."""

    class ShortReplies(asker):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: Any) -> None:
            from pipelines.benchmark import asking

            asking.LONGEST_REPLY = 2**20
            super().__init__(*arguments)

    return ShortReplies


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (b"<html>", "its list of models: Invalid JSON"),
        (b"[]", "its list of models: Input should be"),
        (b'{"data": null}', "its list of models: data: Input should be a valid array"),
        (b'{"data": [{"name": "x"}]}', "its list of models: data.0.id: Field required"),
        (b'{"data": [{"id": "x"}]}', "does not serve greedy; it serves x"),
        (b'{"data": []}', "does not serve greedy; it serves nothing"),
        (b'{"data": [{"id": "greedy", "needs": 3}]}', "data.0.needs: Input should be a valid array"),
    ],
)
def test_a_list_of_models_that_is_none_is_refused_in_one_line(stub: Stub, page: bytes, words: str) -> None:
    stub.pages = {"/v1/models": page}
    with pytest.raises(EndpointError, match=re.escape(words)) as refused:
        served_models(stub.url, ["greedy"])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("page", [b"", b"OK", b"[]", b"3", b'{"engines": 3}', b'{"engines": {"slm": 3}}'])
def test_any_health_page_will_do(stub: Stub, page: bytes) -> None:
    stub.pages = {"/health": page}
    assert served_models(stub.url, ["greedy"])["greedy"]["engines"] == {}


def test_an_endpoint_that_is_not_ready_is_not_benchmarked_without_its_weights(stub: Stub) -> None:
    stub.pages, stub.statuses = {"/health": b'{"status": "unavailable"}'}, {"/health": 503}
    with pytest.raises(EndpointError, match="503 Service Unavailable"):
        served_models(stub.url, ["greedy"])


def test_what_an_entry_says_anew_each_time_is_left_out(stub: Stub) -> None:
    entry = {"id": "greedy", "created": 1, "permission": [{"id": "modelperm-1"}], "root": "path"}
    stub.pages = {"/v1/models": json.dumps({"data": [entry]}).encode()}
    assert served_models(stub.url, ["greedy"]) == {
        "greedy": {"id": "greedy", "root": "path", "needs": [], "engines": {}},
    }


def test_an_endpoint_on_this_machine_is_asked_directly(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at the proxy's address. (That of the actors is another process's: `test_near_hosts...`.)"""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert served_models(stub.url, ["greedy"])


def test_torn_lines_are_left_out_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"key": "1"}\n{"key": "2", "out')
    assert read_answers(tmp_path).keys() == {"1"}
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"key": "1"}\n')
    assert read_answers(tmp_path).keys() == {"1"}
    (tmp_path / "b.jsonl").write_bytes(b'{"key": "3"}\nnoise\n{"key": "4"}\n')
    with pytest.raises(AnswersError, match=r"b\.jsonl:2"):
        read_answers(tmp_path)


def test_a_kept_answer_reads_back_whatever_its_text(tmp_path: Path) -> None:
    RecordLog(tmp_path).append({"key": "1", "text": "\ud83d é \U0001f600"})
    assert read_answers(tmp_path)["1"]["text"] == "\ud83d é \U0001f600"


def test_what_asks_may_fail_once_while_it_starts_and_its_end_is_one_line(
    ray_cluster: None, stub: Stub, recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(asking.Asker):
        """Does not start, `failures` times."""

        def __init__(self, endpoint: str, folder: str, *rest: Any) -> None:
            marks = Path(folder).with_name("marks")
            marks.mkdir(exist_ok=True)
            if len(list(marks.iterdir())) < failures:
                (marks / uuid.uuid4().hex).touch()
                raise OSError("a store was away")
            super().__init__(endpoint, folder, *rest)

    monkeypatch.setattr(asking, "Asker", Failing)
    wanted = job(recipe_path, "benchmark.policies=[greedy]")
    failures = 1
    assert run(wanted, tmp_path / "one", stub)["error"].isna().all()
    monkeypatch.setattr(cluster, "FAILED_STARTS", 0)
    with pytest.raises(asking.AskingError, match="run the same command again"):
        run(wanted, tmp_path / "other", stub)
