"""From answers to graded rows: what was served is graded, a judge remembers, and what a task needs is settled before
anything is asked."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.benchmark.questions import Row
from pipelines.benchmark.verdicts import grade, remembered
from pipelines.grading import sandbox
from pipelines.grading.judge import Ask
from pipelines.tasks import Item, Task, mt_bench, task
from pipelines.tasks.answers import choice_item
from s2t_models.errors import UserError

SUM = Item("math500/1", [{"role": "user", "content": "2+2?"}], "4", {"question": "2+2?"})


def graded(
    item: Item, outputs: list[str], name: str = "math500", ask: Ask | None = None, **answer: Any
) -> dict[str, Any]:
    row = Row(task(name), item, "maj@3", 0, 0, {})
    known = {"outputs": outputs, "finish": "stop", "tokens": 1, "s2t": {}, "seconds": 1.0, "error": None} | answer
    return grade([row], {row.key: known}, {}, ask)[0]


def test_what_was_served_is_graded_whatever_the_samples_say() -> None:
    row = graded(SUM, ["\\boxed{4}"], s2t={"samples": ["\\boxed{5}", "\\boxed{5}", "\\boxed{4}"]})
    assert (row["verdict"], row["extracted"], len(row["samples"])) == ("correct", "4", 3)


def test_text_that_breaks_a_grader_is_one_wrong_row() -> None:
    assert graded(SUM, [f"The answer is {'3' * 5000}"])["verdict"] == "wrong"
    assert graded(SUM, ["\ud83d\x00"])["verdict"] == "wrong"
    assert graded(SUM, ["\\boxed{4"], finish="length")["verdict"] == "correct"
    assert graded(SUM, ["so we"], finish="length")["verdict"] == "truncated"
    assert graded(SUM, [])["verdict"] == "errored"


def test_the_options_travel_with_the_question() -> None:
    item = choice_item("mmlu_pro/1", "Which?", ["first", "second"], "B")
    row = Row(task("mmlu_pro"), item, "maj@3", 0, 0, {})
    assert row.question()["options"] == '["first", "second"]'
    assert Row(task("math500"), SUM, "maj@3", 0, 0, {}).question()["options"] == "[]"


def test_a_judge_grades_its_own_task_and_is_asked_once(tmp_path: Path) -> None:
    prompts = {
        f"single-v1{turn}": {"system_prompt": "", "prompt_template": "{answer_1}"} for turn in ("", "-multi-turn")
    }
    item = Item("mt_bench/1", [], [], {"turns": ["a", "b"], "judge_prompts": prompts, "category": "writing"})
    asked: list[object] = []

    def ask(chat: list[dict[str, str]]) -> str:
        asked.append(chat)
        return "[[8]]"

    for _ in range(2):
        row = graded(item, ["one", "two"], "mt_bench", remembered(ask, "judge", tmp_path))
        assert (row["verdict"], row["score"]) == ("correct", 0.8)
    assert len(asked) == 1, "both turns ask the same here, and the second job reads what the first was told"
    assert "1 answers" in graded(item, ["one"], "mt_bench", ask)["error"]
    with pytest.raises(UserError, match="mt_bench is graded by a judge model"):
        mt_bench.TASK.grade(["one", "two"], item)


def test_a_task_that_cannot_be_graded_here_refuses_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "no user namespaces")
    programs: Task = task("humaneval")
    with pytest.raises(
        UserError, match=r"cannot be isolated on this system \(no user namespaces\).*--allow-unsandboxed"
    ):
        programs.prepared()
    allowed = programs.prepared(allow_unsandboxed=True)
    item = Item(
        "humaneval/1",
        [],
        "",
        {"question": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"},
    )
    assert allowed.grade("    return 1", item).verdict == "correct"
    assert "cannot be isolated" in programs.grade("    return 1", item).detail
    assert task("math500").prepared() is task("math500")
