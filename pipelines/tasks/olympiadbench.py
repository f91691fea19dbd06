"""OlympiadBench: 675 English, text-only, open-ended maths problems; some with a tolerance, some with several
answers."""

from __future__ import annotations

from pipelines.tasks.answers import correct_maths, extract_maths, maths_prompt, published_maths
from pipelines.tasks.base import Item, Task
from pipelines.tasks.source import Pinned, Record, Source, required

SOURCE = Source(
    "olympiadbench/test.jsonl.gz",
    Pinned(
        "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465"
        "/evaluation/data/olympiadbench/test.jsonl",
        "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416",
    ),
)


def read(tables: list[list[Record]]) -> list[Item]:
    items = []
    for row in required(tables[0], ("id", "context", "question", "solution", "final_answer", "error", "unit"), SOURCE):
        question = f"{row['context']}\n{row['question']}" if row["context"] else row["question"]
        metadata = {
            "question": question,
            "solution": row["solution"][0] if row["solution"] else "",
            "tolerance": float(row["error"]) if row["error"] else None,
            "unit": row["unit"],
            "subject": row["subfield"],
        }
        items.append(
            Item(
                f"olympiadbench/{row['id']}", maths_prompt(question), row["final_answer"][0].replace("$", ""), metadata
            )
        )
    return items


TASK = Task(
    "olympiadbench", (SOURCE,), read, extract_maths, correct_maths, published=published_maths, max_new_tokens=4096
)
