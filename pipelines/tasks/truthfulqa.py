"""TruthfulQA, mc1: 817 questions with one true choice.

The data list the true choice first, so the choices are shuffled with a fixed seed before they are lettered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from pipelines.tasks.answers import LETTERS, choice_item, correct_choice, extract_choice, published_choice
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SHUFFLE_SEED = 0
SOURCE = Source(
    "truthfulqa/mc_task.json",
    Hub(
        "truthfulqa/truthful_qa",
        "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        ("multiple_choice/validation-00000-of-00001.parquet",),
    ),
)


def _targets(targets: Mapping[str, object]) -> list[tuple[str, int]]:
    """Choices with 1 for the true one, from either layout: text to label, or a list of each."""
    if set(targets) == {"choices", "labels"}:
        return list(zip(targets["choices"], targets["labels"], strict=True))  # type: ignore[call-overload]
    return [(text, int(str(label))) for text, label in targets.items()]


def read(tables: list[list[Record]]) -> list[Item]:
    items = []
    for index, row in enumerate(required(tables[0], ("question", "mc1_targets"), SOURCE)):
        targets = _targets(row["mc1_targets"])
        random.Random(f"{SHUFFLE_SEED}/{row['question']}").shuffle(targets)
        answer = LETTERS[[label for _, label in targets].index(1)]
        items.append(choice_item(f"truthfulqa/{index}", row["question"], [text for text, _ in targets], answer))
    return items


TASK = Task("truthfulqa", (SOURCE,), read, extract_choice, correct_choice, published=published_choice, most_options=13)
