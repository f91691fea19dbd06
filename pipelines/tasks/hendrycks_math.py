"""MATH (Hendrycks): the train split for labelling, and the test rows outside MATH-500 for calibration.

`math-train` and `math-calibration` are prompt sources for the collect pipeline that can also be graded. On the hub the
rows carry no identifiers, so theirs are counted; MATH-500 is left out of the calibration rows by the problems' text.
"""

from __future__ import annotations

from pipelines.tasks import math500
from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt, published_maths
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required
from pipelines.tasks.splits import text_hash
from s2t_models.answers.final_answer import boxed

_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _source(split: str) -> Source:
    files = tuple(f"{subject}/{split}-00000-of-00001.parquet" for subject in _SUBJECTS)
    return Source(
        f"math/{split}.jsonl.gz", Hub("EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", files)
    )


TRAIN, TEST = _source("train"), _source("test")


def _items(name: str, rows: list[Record], source: Source) -> list[Item]:
    """Raises ValueError for a solution without a boxed answer."""
    items = []
    for index, row in enumerate(required(rows, ("problem", "solution", "type", "level"), source)):
        answer = boxed(row["solution"])
        if answer is None:
            raise ValueError(f"{source.local}, row {index + 1}: the solution has no \\boxed answer")
        metadata = {
            "question": row["problem"],
            "solution": row["solution"],
            "subject": row["type"],
            "level": row["level"],
        }
        items.append(Item(f"{name}/{row.get('unique_id', index)}", maths_prompt(row["problem"]), answer, metadata))
    return items


def read_train(tables: list[list[Record]]) -> list[Item]:
    return _items("math-train", tables[0], TRAIN)


def read_calibration(tables: list[list[Record]]) -> list[Item]:
    held_out = {text_hash(row["problem"]) for row in tables[1]}
    return [item for item in _items("math-calibration", tables[0], TEST) if text_hash(item.question) not in held_out]


MATH_TRAIN = Task("math-train", (TRAIN,), read_train, extract_maths, correct_maths, published=published_maths)
MATH_CALIBRATION = Task(
    "math-calibration",
    (TEST, math500.SOURCE),
    read_calibration,
    extract_maths,
    correct_maths,
    published=published_maths,
)
