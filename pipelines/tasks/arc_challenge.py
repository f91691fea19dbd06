"""ARC-Challenge test: 1,172 school science questions with three to five options."""

from __future__ import annotations

from pipelines.tasks.answers import LETTERS, choice_item, correct_choice, extract_choice, published_choice
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SOURCE = Source(
    "arc_challenge/test.jsonl",
    Hub("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", ("ARC-Challenge/test-00000-of-00001.parquet",)),
)


def read(tables: list[list[Record]]) -> list[Item]:
    """Rows that number their options 1-4 are lettered."""
    items = []
    for row in required(tables[0], ("id", "question", "choices", "answerKey"), SOURCE):
        answer = LETTERS[list(row["choices"]["label"]).index(row["answerKey"])]
        items.append(choice_item(f"arc_challenge/{row['id']}", row["question"], row["choices"]["text"], answer))
    return items


TASK = Task(
    "arc_challenge", (SOURCE,), read, extract_choice, correct_choice, published=published_choice, most_options=5
)
