"""`s2t grade`: recorded responses, by id or with their answers, voted over, malformed, judged."""

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.grade import main
from pipelines.grading import sandbox
from pipelines.results.statistics import wilson
from pipelines.tasks import task

ResponseLine = dict[str, Any]


def run(tmp_path: Path, name: str, rows: list[ResponseLine | str], *options: str) -> tuple[int, list[ResponseLine]]:
    """Exit status and the graded lines."""
    path, output = tmp_path / "responses.jsonl", tmp_path / "graded.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    status = main([name, str(path), "--output", str(output), *options])
    return status, [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def test_answers_on_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[ResponseLine | str] = [
        {"response": "So it is \\boxed{1{,}000}.", "answer": "1000", "model": "m", "n": [1, {"a": None}]},
        {"response": "She has 18.00 dollars. #### 18", "answer": 18},
        {"response": "The answer is 7.", "answer": "8"},
        {"response": "and then we", "answer": "8", "finish_reason": "length"},
        {"response": "cut but \\boxed{8} there", "answer": "8", "finish_reason": "length"},
        {"response": None, "answer": "8", "error": "no answer after 3 tries"},
        {"response": "\\boxed{\\frac12}", "answer": ["0.5", "x"]},
    ]
    status, graded = run(tmp_path, "math500", rows)
    assert status == 0
    assert [row["verdict"] for row in graded] == [
        "correct",
        "correct",
        "wrong",
        "truncated",
        "correct",
        "errored",
        "correct",
    ]
    assert [row["correct"] for row in graded] == [row["verdict"] == "correct" for row in graded]
    assert [row["extracted"] for row in graded] == ["1{,}000", "18", "7", None, "8", None, "\\frac12"]
    assert graded[0]["model"] == "m"
    assert graded[0]["n"] == [1, {"a": None}]
    low, high = wilson(4, 7)
    said = capsys.readouterr().out
    assert f"accuracy 57.14% [{100 * low:.2f}, {100 * high:.2f}] on 7 rows" in said
    assert "(4 correct, 1 wrong, 1 truncated, 1 errored)" in said


def test_rows_by_id(tmp_path: Path, data_dir: Path) -> None:
    items = task("math500").load(data_dir)[:20]
    rows: list[ResponseLine | str] = [{"id": item.uid, "response": item.metadata["solution"]} for item in items]
    rows += [{"id": item.uid.removeprefix("math500/"), "response": "\\boxed{0.123}"} for item in items]
    status, graded = run(tmp_path, "math500", rows, "--data", str(data_dir))
    assert status == 0
    assert [row["correct"] for row in graded] == [True] * 20 + [False] * 20
    status, graded = run(
        tmp_path, "mmlu_pro", [{"id": 3983, "response": "The answer is (C)."}], "--data", str(data_dir)
    )
    assert [row["extracted"] for row in graded] == ["C"]
    assert graded[0]["correct"]


def test_a_percentage_is_seen_from_the_question_or_the_response(tmp_path: Path) -> None:
    rows: list[ResponseLine | str] = [
        {"response": "\\boxed{10\\%}", "answer": "10"},
        {"response": "The percentage is \\boxed{10\\%}", "answer": "10"},
        {"response": "\\boxed{10}", "answer": "10\\%"},
        {"response": "\\boxed{10\\%}", "answer": "10", "question": "What percent of 50 is 5?"},
        {"response": "The percentage is \\boxed{10\\%}", "answer": "10", "question": "How many are left?"},
    ]
    assert [row["correct"] for row in run(tmp_path, "math500", rows)[1]] == [False, True, True, True, False]


def test_lists_are_voted_over(tmp_path: Path) -> None:
    rows: list[ResponseLine | str] = [
        {"response": ["\\boxed{1}", "\\boxed{2}", "\\boxed{2.0}"], "answer": "2"},
        {"response": ["\\boxed{1}", "\\boxed{2}"], "answer": "2"},
        {"response": ["no idea", "none", "\\boxed{2}"], "answer": "2"},
        {"response": ["no idea", "none"], "answer": "2"},
        {"response": ["\\boxed{0.5}", "\\boxed{3}", "\\boxed{\\frac{1}{2}}", "\\boxed{3}"], "answer": "1/2"},
    ]
    graded = run(tmp_path, "math500", rows)[1]
    assert [row["correct"] for row in graded] == [True, False, True, False, True]
    assert [row["extracted"] for row in graded] == ["2", "1", "2", None, "0.5"]
    letters: list[ResponseLine | str] = [
        {"response": ["Answer: A", "Answer: B", "Answer: B"], "answer": "B"},
        {"response": ["Answer: A", "the moon", "Answer: B"], "answer": "B", "options": ["the sun", "the moon"]},
    ]
    assert [row["correct"] for row in run(tmp_path, "arc_challenge", letters)[1]] == [True, True]


def test_a_byte_order_mark_and_half_characters_are_taken(tmp_path: Path) -> None:
    rows: list[ResponseLine | str] = [
        '\ufeff{"response": "5", "answer": "5"}',
        '{"response": "\\ud83d 5", "answer": "5", "note": "\\ud83d"}',
    ]
    status, graded = run(tmp_path, "math500", rows)
    assert status == 0
    assert [row["correct"] for row in graded] == [True, True]
    assert graded[1]["note"] == "\ud83d"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no lines to grade"),
        ("\n \n", "there are no lines to grade"),
        ("noise\n[1]\n", "none of its lines could be graded"),
        ('{"answer": ' + "9" * 5000 + "}\n", "none of its lines could be graded"),
        (
            '{"answer": "5", "response": null, "error": "refused"}\n',
            "none of its lines could be graded; the first error: refused",
        ),
    ],
)
def test_a_file_with_nothing_to_grade_is_status_2(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text(content)
    assert main(["math500", str(path)]) == 2
    said = capsys.readouterr()
    assert message in said.err.splitlines()[-1]
    assert not said.out


def test_malformed_lines_are_named_and_the_others_graded(
    tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[ResponseLine | str] = [
        {"response": "#### 18", "id": 0},
        '{"response": "cut',
        "[1, 2]",
        {"answer": "3"},
        {"response": 3, "answer": "3"},
        {"response": [], "answer": "3"},
        {"response": "x"},
        {"response": "x", "id": "99999"},
        {"response": "x", "answer": []},
        "",
        {"response": "#### 4", "answer": "3"},
    ]
    status, graded = run(tmp_path, "gsm8k", rows, "--data", str(data_dir))
    said = capsys.readouterr()
    assert status == 1
    assert [row["correct"] for row in graded] == [True, False]
    assert [line.split("responses.jsonl, ")[1].split(";")[0] for line in said.err.splitlines()] == [
        "line 2: not JSON (Unterminated string starting at)",
        "line 3: not a JSON object",
        "line 4: no field 'response'",
        "line 5: 'response' must be a text or a list of texts",
        "line 6: 'response' must be a text or a list of texts",
        "line 7: neither 'answer' nor 'id'",
        "line 8: gsm8k has no row '99999'",
        "line 9: 'answer' is an empty list",
    ]
    assert "on 2 rows" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gsm9k", "FILE"], "there is no task 'gsm9k'"),
        (["gsm8k", "missing.jsonl"], "No such file"),
        (["gsm8k", "FILE", "--data", "nowhere"], "nowhere/gsm8k/test.jsonl does not exist"),
        (["mt_bench", "FILE"], "mt_bench is graded by a judge model"),
    ],
)
def test_what_cannot_be_graded_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text('{"id": 0, "response": "x"}\n')
    assert main([str(path) if argument == "FILE" else argument for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_humaneval_runs_in_the_sandbox(tmp_path: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if sandbox.unavailable():
        pytest.skip(f"no isolation here: {sandbox.unavailable()}")
    items = task("humaneval").load(data_dir)[:2]
    rows: list[ResponseLine | str] = [
        {"id": "HumanEval/0", "response": f"```python\n{items[0].question}{items[0].answer}```"},
        {"id": "1", "response": "    return None"},
        {"id": "1", "response": ["a", "b"]},
        {"answer": "1", "response": "x"},
    ]
    status, graded = run(tmp_path, "humaneval", rows, "--data", str(data_dir))
    assert status == 1
    assert [row["correct"] for row in graded] == [True, False]
    said = capsys.readouterr().err
    assert "line 3: humaneval does not vote" in said
    assert "line 4: humaneval rows are graded by 'id'" in said


class StubJudge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that rates every answer 8, or gives no rating or no text where the answer says
    so."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        assert body["model"] == "judge"
        asked = body["messages"][1]["content"]
        rating = None if "NULL" in asked else "no rating" if "MUTE" in asked else "Rating: [[8]]"
        choices = [] if "EMPTY" in asked else [{"message": {"role": "assistant", "content": rating}}]
        data = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def judge_url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), StubJudge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_mt_bench_asks_an_openai_endpoint(
    tmp_path: Path,
    data_dir: Path,
    judge_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    words = ("two", "MUTE", "NULL", "EMPTY")
    rows: list[ResponseLine | str] = [{"id": 81 + n, "response": ["one", word]} for n, word in enumerate(words)]
    options = ("--data", str(data_dir), "--judge", judge_url, "--judge-model", "judge")
    status, graded = run(tmp_path, "mt_bench", rows, *options)
    assert status == 0
    assert [(row["verdict"], row["extracted"], row["score"]) for row in graded] == [
        ("correct", "8, 8", 0.8),
        *[("errored", None, 0.0)] * 3,
    ]
    assert graded[1]["error"] == "the judge gave no rating of the form [[n]] from 1 to 10"
    assert all("is not a chat completion with a text" in row["error"] for row in graded[2:])
    assert "mean rating 2.00" in capsys.readouterr().out


def test_the_order_of_thousands_of_lines_is_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    values = [rng.randrange(100) for _ in range(3000)]
    rows: list[ResponseLine | str] = [
        {"response": f"\\boxed{{{value}}}", "answer": "50", "line": n} for n, value in enumerate(values)
    ]
    _, graded = run(tmp_path, "gsm8k", rows)
    assert [row["line"] for row in graded] == list(range(3000))
    assert [row["correct"] for row in graded] == [value == 50 for value in values]


def test_runs_as_a_module(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text('{"response": "5", "answer": "5"}\n')
    done = subprocess.run([sys.executable, "-m", "pipelines.grade", "gsm8k", str(path)], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("gsm8k: accuracy 100.00% [")
    assert done.stderr == ""
