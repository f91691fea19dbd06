"""HumanEval: 164 functions to write, run against their tests in the sandbox (pass@1)."""

from __future__ import annotations

from dataclasses import replace

from pipelines.grading import sandbox
from pipelines.grading.code import program
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Row, Source, required

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


def read(tables: list[list[Row]]) -> list[Item]:
    fields = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    return [
        Item(
            f"humaneval/{row['task_id'].removeprefix('HumanEval/')}",
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}],
            row["canonical_solution"],
            {"question": row["prompt"], "entry_point": row["entry_point"], "test": row["test"]},
        )
        for row in required(tables[0], fields, SOURCE)
    ]


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


TASK = Task("humaneval", (SOURCE,), read, extract, passes, max_new_tokens=512, votes=False)


def unsandboxed() -> Task:
    """The task for systems without isolation: model-written code runs with this user's rights. Only where asked for."""
    return replace(TASK, correct=lambda extracted, item: passes(extracted, item, allow_unsandboxed=True))
