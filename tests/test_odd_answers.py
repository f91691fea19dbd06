"""Odd answers and programs, each with the verdict that the official scripts and a sensible person would give
(`odd_*.jsonl`), and text made to hold up or break a grader."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.grading import sandbox
from pipelines.grading.code import program
from pipelines.results.recorded import RecordedGrader
from pipelines.tasks import Item, humaneval, task

HERE = Path(__file__).parent
PROMPTS = {
    "add": (
        'def add(x: int, y: int):\n    """Add two numbers x and y\n    >>> add(2, 3)\n    5\n    """\n',
        "assert candidate(2, 3) == 5",
    ),
    "has_close_elements": (
        "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n"
        '    """ Check if in given list of numbers, are any two numbers closer to each other than given '
        'threshold.\n    """\n',
        "assert candidate([1.0, 2.0, 2.1], 0.3)\n    assert not candidate([1.0, 2.0, 2.1], 0.05)",
    ),
    "find_zero": (
        "import math\n\n\ndef poly(xs: list, x: float):\n    return sum([coeff * math.pow(x, i) for i, coeff in "
        "enumerate(xs)])\n\n\n"
        'def find_zero(xs: list):\n    """ xs are coefficients of a polynomial; return one x such that poly(xs, x) '
        '= 0.\n    """\n',
        "assert abs(poly([-6, 11, -6, 1], candidate([-6, 11, -6, 1]))) < 1e-4",
    ),
}


def rows(name: str) -> list[Any]:
    found = [json.loads(line) for line in (HERE / name).read_text().splitlines()]
    return [
        pytest.param(row, id=f"{number}-{re.sub(r'[^a-zA-Z0-9]+', '-', row['why'])}")
        for number, row in enumerate(found, 1)
    ]


@pytest.mark.parametrize("row", rows("odd_answers.jsonl"))
def test_odd_answer(row: dict[str, Any]) -> None:
    graded = RecordedGrader(task(row["task"]), {}).grade(row)
    assert graded["verdict"] == ("correct" if row["expected"] else "wrong"), (graded["extracted"], row)


@pytest.mark.skipif(sandbox.unavailable() is not None, reason=f"no isolation here: {sandbox.unavailable()}")
@pytest.mark.parametrize("row", rows("odd_programs.jsonl"))
def test_odd_program(row: dict[str, Any]) -> None:
    prompt, test = PROMPTS[row["function"]]
    metadata = {"question": prompt, "entry_point": row["function"], "test": f"def check(candidate):\n    {test}\n"}
    graded = humaneval.TASK.grade(row["response"], Item("humaneval/odd", [], "", metadata))
    assert graded.verdict == ("correct" if row["expected"] else "wrong"), (graded.extracted, row["response"])


HOSTILE = (
    "9", "1,", "$", "\\boxed", "\\boxed{", "\\boxed{5} and ", "answer is ", "The answer is (", "answer (", "####",
    "\n", " ", "\u2003", "\\(", "\\[", "<answer>", "{\"answer\": ", "\"answer\":\"\\", "<think>", "that ", "A ",
    "(A) ", "option A and ", "answer to ", "\\text{", "{", "(", "[", "-", "**", "`", "```\n", "def add(",
    "def add(x, y):\n    return x\n", "it's ", "\"\"\"\n", "@a\n", "1/2 ", "= ", "\\approx ",
)  # fmt: skip


@pytest.mark.parametrize("grader", ["maths", "choice", "code"])
def test_no_text_holds_up_a_grader(grader: str) -> None:
    """A hundred thousand characters of any of these take a fraction of a second; where time grows with the square, the
    limit ends it."""
    read = {
        "maths": "from s2t_models.answers.voting import vote_key as read",
        "choice": "from s2t_models.answers.voting import vote_key\nread = lambda text: vote_key(text, ['one', "
        "'two', 'three'])",
        "code": "from pipelines.grading.code import program\nread = lambda text: program(text, 'def add(x, y):\\n"
        "', 'add')",
    }[grader]
    script = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n{read}\n"
        f"for part in {HOSTILE!r}:\n"
        "    for before, after in (('', ''), ('The answer is ', 'x'), ('\\\\boxed{', '}')):\n"
        "        read(before + part * (100_000 // len(part)) + after)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    ("name", "response"),
    [
        ("math500", f"The answer is {'9' * 5000}"),
        ("math500", f"\\boxed{{{'{' * 5000}5{'}' * 5000}}}"),
        ("math500", "\\boxed{1e999999999}"),
        ("math500", "\\boxed{NaN}"),
        ("math500", "\\boxed{\ud83d}"),
        ("math500", "\\boxed{\x00}"),
        ("mmlu_pro", '{"answer": ' + "[" * 5000),
        ("mmlu_pro", "\ud83d\x00"),
    ],
)
def test_no_text_raises(name: str, response: str) -> None:
    graded = RecordedGrader(task(name), {}).grade({"response": response, "answer": "B"})
    assert graded["verdict"] == "wrong"


def test_a_grader_that_fails_makes_the_row_errored(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **settings: object) -> bool:
        raise RecursionError("too deep")

    monkeypatch.setattr("pipelines.grading.maths.equal", fail)
    graded = task("math500").grade("\\boxed{5}", Item("x/1", [], "5", {"question": "?"}))
    assert (graded.verdict, graded.detail) == ("errored", "the grader failed: RecursionError: too deep")


def test_programs_that_no_parser_takes_are_still_programs() -> None:
    for text in (
        "(" * 5000,
        "x = " + "-" * 100_000 + "1",
        "def add(x, y):\n    return " + "9" * 5000,
        "\x00",
        "\ud83d",
    ):
        assert "def add" in program(text, "def add(x, y):\n    '''Add.'''\n", "add")
