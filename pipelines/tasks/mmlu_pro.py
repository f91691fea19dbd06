"""MMLU-Pro test: 12,032 questions with up to ten options in 14 categories. Samples are spread over the categories."""

from __future__ import annotations

from pipelines.tasks.answers import choice_item, correct_choice, extract_choice, published_choice
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Hub, Record, Source, required

SOURCE = Source(
    "mmlu_pro/test.jsonl.gz",
    Hub("TIGER-Lab/MMLU-Pro", "b189ec765aa7ed75c8acfea42df31fdae71f97be", ("data/test-00000-of-00001.parquet",)),
)


def read(tables: list[list[Record]]) -> list[Item]:
    """`answer` is the gold letter; `answer_index` contradicts it in question 3983 and is not used."""
    return [
        choice_item(
            f"mmlu_pro/{row['question_id']}",
            row["question"],
            [option for option in row["options"] if option != "N/A"],
            row["answer"],
            category=row["category"],
        )
        for row in required(tables[0], ("question_id", "question", "options", "answer", "category"), SOURCE)
    ]


TASK = Task(
    "mmlu_pro",
    (SOURCE,),
    read,
    extract_choice,
    correct_choice,
    published=published_choice,
    most_options=10,
    max_new_tokens=4096,
    stratify="category",
)
