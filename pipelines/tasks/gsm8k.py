"""GSM8K test: 1,319 grade-school word problems; the gold answer follows `####`."""

from __future__ import annotations

from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SOURCE = Source(
    "gsm8k/test.jsonl",
    Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", ("main/test-00000-of-00001.parquet",)),
)


def read(tables: list[list[Record]]) -> list[Item]:
    return [
        Item(
            f"gsm8k/{index}",
            maths_prompt(row["question"]),
            row["answer"].rsplit("####", 1)[1].strip().replace(",", ""),
            {"question": row["question"], "solution": row["answer"]},
        )
        for index, row in enumerate(required(tables[0], ("question", "answer"), SOURCE))
    ]


TASK = Task("gsm8k", (SOURCE,), read, extract_maths, correct_maths)
