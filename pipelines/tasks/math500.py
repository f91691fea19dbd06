"""MATH-500: 500 competition problems of the MATH test split."""

from __future__ import annotations

from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt, published_maths
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SOURCE = Source(
    "math500/test.jsonl",
    Hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", ("test.jsonl",)),
)


def read(tables: list[list[Record]]) -> list[Item]:
    return [
        Item(
            f"math500/{row['unique_id']}",
            maths_prompt(row["problem"]),
            row["answer"],
            {"question": row["problem"], "solution": row["solution"], "subject": row["subject"], "level": row["level"]},
        )
        for row in required(tables[0], ("unique_id", "problem", "solution", "answer", "subject", "level"), SOURCE)
    ]


TASK = Task("math500", (SOURCE,), read, extract_maths, correct_maths, published=published_maths)
