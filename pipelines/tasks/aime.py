"""AIME 2024 and 2025, papers I and II: 30 problems a year with answers from 0 to 999."""

from __future__ import annotations

from functools import partial

from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt, published_maths
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SOURCE24 = Source(
    "aime24/test.jsonl",
    Hub("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", ("data/train-00000-of-00001.parquet",)),
)
SOURCE25 = Source(
    "aime25/test.jsonl", Hub("math-ai/aime25", "563bb8404243c5f09de6ec262f2db674fe5bce9b", ("test.jsonl",))
)


def read(name: str, source: Source, tables: list[list[Record]]) -> list[Item]:
    return [
        Item(
            f"{name}/{row['id']}",
            maths_prompt(row["problem"]),
            str(int(row["answer"])),
            {"question": row["problem"], "solution": row.get("solution") or ""},
        )
        for row in required(tables[0], ("id", "problem", "answer"), source)
    ]


def _task(name: str, source: Source) -> Task:
    return Task(
        name,
        (source,),
        partial(read, name, source),
        extract_maths,
        correct_maths,
        published=published_maths,
        max_new_tokens=4096,
    )


AIME24, AIME25 = _task("aime24", SOURCE24), _task("aime25", SOURCE25)
