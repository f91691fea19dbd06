"""MT-Bench: 80 conversations of two turns, rated by a judge model. The judge's prompts are data."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.grading.judge import Ask, Conversation, JudgeError, rate
from pipelines.tasks.base import Graded, Item, Task
from pipelines.tasks.source import Pinned, Record, Source, required

_ROOT = (
    "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data"
)
QUESTIONS = Source(
    "mt_bench/question.jsonl",
    Pinned(f"{_ROOT}/mt_bench/question.jsonl", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"),
)
REFERENCES = Source(
    "mt_bench/reference_answer_gpt-4.jsonl",
    Pinned(
        f"{_ROOT}/mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
)
PROMPTS = Source(
    "mt_bench/judge_prompts.jsonl",
    Pinned(f"{_ROOT}/judge_prompts.jsonl", "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
)
REFERENCED = ("math", "reasoning", "coding")  # the categories that are judged against a reference answer
PASS_RATING = 6.0  # mean rating from which a conversation counts as correct; the rating itself is the score


def read(tables: list[list[Record]]) -> list[Item]:
    references = {row["question_id"]: row["choices"][0]["turns"] for row in tables[1]}
    prompts = {row["name"]: row for row in tables[2]}
    items = []
    for row in required(tables[0], ("question_id", "category", "turns"), QUESTIONS):
        known = references.get(row["question_id"], []) if row["category"] in REFERENCED else []
        metadata = {
            "question": row["turns"][0],
            "turns": row["turns"],
            "category": row["category"],
            "judge_prompts": prompts,
        }
        items.append(
            Item(f"mt_bench/{row['question_id']}", [{"role": "user", "content": row["turns"][0]}], known, metadata)
        )
    return items


def judged(answers: Sequence[str], item: Item, ask: Ask) -> Graded:
    """Grades both turns' answers with a judge. A turn without a rating makes the row errored, and so does a judge that
    gives no answer. Raises ValueError where there is not one answer a turn."""
    conversation = Conversation(tuple(item.metadata["turns"]), tuple(item.answer))
    try:
        ratings = rate(conversation, answers, item.metadata["judge_prompts"], ask)
    except JudgeError as error:
        return Graded("errored", None, 0.0, str(error))
    known = [value for value in ratings if value is not None]
    if len(known) < len(ratings):
        return Graded("errored", None, 0.0, "the judge gave no rating of the form [[n]] from 1 to 10")
    mean = sum(known) / len(known)
    text = ", ".join(f"{value:g}" for value in known)
    return Graded("correct" if mean >= PASS_RATING else "wrong", text, mean / 10)


TASK = Task("mt_bench", (QUESTIONS, REFERENCES, PROMPTS), read, judge=judged, turns=2, votes=False, stratify="category")
