"""GSM8K: grade-school word problems; the gold answer follows `####`.

`gsm8k` is the test split, 1,319 rows. The 7,473 training rows are two prompt sources for the collect pipeline that can
also be graded: the last 1,000 are `gsm8k-calibration`, the others `gsm8k-train`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt, published_maths
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required
from pipelines.tasks.splits import text_hash

CALIBRATION = 1000


def _source(split: str, local: str) -> Source:
    revision = "740312add88f781978c0658806c59bc2815b9866"
    return Source(local, Hub("openai/gsm8k", revision, (f"main/{split}-00000-of-00001.parquet",)))


TRAIN, TEST = _source("train", "gsm8k/train.jsonl.gz"), _source("test", "gsm8k/test.jsonl")


def _items(name: str, rows: list[Record], source: Source) -> Iterator[Item]:
    for index, row in enumerate(required(rows, ("question", "answer"), source)):
        yield Item(
            f"{name}/{index}",
            maths_prompt(row["question"]),
            row["answer"].rsplit("####", 1)[1].strip().replace(",", ""),
            {"question": row["question"], "solution": row["answer"]},
        )


def read_test(tables: list[list[Record]]) -> list[Item]:
    return list(_items("gsm8k", tables[0], TEST))


def read_train(tables: list[list[Record]]) -> list[Item]:
    return list(_items("gsm8k-train", tables[0], TRAIN))[:-CALIBRATION]


def read_calibration(tables: list[list[Record]]) -> list[Item]:
    """The last rows, but for questions that the others ask as well."""
    trained = {text_hash(item.question) for item in read_train(tables)}
    held_out = list(_items("gsm8k-calibration", tables[0], TRAIN))[-CALIBRATION:]
    return [item for item in held_out if text_hash(item.question) not in trained]


GSM8K = Task("gsm8k", (TEST,), read_test, extract_maths, correct_maths, published=published_maths)
GSM8K_TRAIN = Task("gsm8k-train", (TRAIN,), read_train, extract_maths, correct_maths, published=published_maths)
GSM8K_CALIBRATION = Task(
    "gsm8k-calibration", (TRAIN,), read_calibration, extract_maths, correct_maths, published=published_maths
)
