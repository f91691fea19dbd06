"""HumanEval: 164 functions to write, run against their tests in the sandbox (pass@1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pipelines.grading import sandbox
from pipelines.grading.code import program
from pipelines.tasks.base import Item, Message, Task
from pipelines.tasks.source import Hub, Record, Source, required

SYSTEM = (
    "Complete the given Python function. Output only the code, without markdown formatting and without explanations."
)
SOURCE = Source(
    "humaneval/HumanEval.jsonl.gz",
    Hub(
        "openai/openai_humaneval",
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        ("openai_humaneval/test-00000-of-00001.parquet",),
    ),
)


def read(tables: list[list[Record]]) -> list[Item]:
    fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return [
        Item(
            f"humaneval/{row['task_id'].removeprefix('HumanEval/')}",
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}],
            row["canonical_solution"],
            {"id": row["task_id"], "question": row["prompt"], "entry_point": row["entry_point"], "test": row["test"]},
        )
        for row in required(tables[0], fields, SOURCE)
    ]


def published(item: Item) -> list[Message]:
    """In the words of the authors' code."""
    system = "You write Python code. Output only Python code. No markdown, no explanation."
    return [{"role": "system", "content": system}, {"role": "user", "content": item.question}]


def extract(response: str, item: Item) -> str | None:
    return program(response, item.question, item.metadata["entry_point"]) if response.strip() else None


def passes(extracted: str, item: Item, allow_unsandboxed: bool = False) -> bool:
    """Raises sandbox.SandboxUnavailable."""
    return sandbox.check(
        extracted,
        item.metadata["test"],
        item.metadata["entry_point"],
        preamble=item.question + "\n    pass\n",
        allow_unsandboxed=allow_unsandboxed,
    ).passed


def prepare(task: Task, allow_unsandboxed: bool) -> Task:
    """Raises sandbox.SandboxUnavailable where programs cannot be isolated and that is not allowed."""
    if (reason := sandbox.unavailable()) is None:
        return task
    if not allow_unsandboxed:
        raise sandbox.refusal(reason)
    return replace(task, correct=partial(passes, allow_unsandboxed=True))


TASK = Task(
    "humaneval", (SOURCE,), read, extract, passes, published=published, prepare=prepare, max_new_tokens=512, votes=False
)
