"""What the maths tasks share, extraction and equality; and likewise what the choice tasks do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.grading import maths
from pipelines.tasks.base import MATHS_SYSTEM, Item, Message
from s2t_models.answers.choices import LETTERS, choice
from s2t_models.answers.final_answer import final_answer

_PERCENT = re.compile(r"per\s?cent|%", re.IGNORECASE)


def asks_percentage(question: str) -> bool:
    return _PERCENT.search(question) is not None


def maths_prompt(question: str) -> list[Message]:
    """The zero-shot chat prompt of the Qwen2.5-Math evaluation."""
    return [{"role": "system", "content": MATHS_SYSTEM}, {"role": "user", "content": question}]


def published_maths(item: Item) -> list[Message]:
    """In the words of the authors' code."""
    system = (
        "You are a helpful assistant. Please answer the math problem step by step, and put the final answer in the "
        "format \\boxed{answer}."
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": item.question}]


def extract_maths(response: str, item: Item) -> str | None:
    return final_answer(response)


def correct_maths(extracted: str, item: Item) -> bool:
    """Equal to the gold answer, or to one of several. Heeds `metadata["tolerance"]`, and a question that asks for a
    percentage (`metadata["percent_asked"]` where the question's text is not known)."""
    golds = [item.answer] if isinstance(item.answer, str) else item.answer
    percent_asked = item.metadata.get("percent_asked", asks_percentage(item.question))
    tolerance = item.metadata.get("tolerance")
    return any(maths.equal(gold, extracted, percent_asked=percent_asked, tolerance=tolerance) for gold in golds)


def choice_prompt(question: str, options: Sequence[str]) -> list[Message]:
    """Question, lettered options, and the phrase that the answer is to be given in."""
    text = (
        f"{question}\n{_listed(options)}\n\nThink step by step and then finish your answer with "
        '"the answer is (X)" where X is the correct letter choice.'
    )
    return [{"role": "user", "content": text}]


def _listed(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def published_choice(item: Item) -> list[Message]:
    """In the words of the authors' code."""
    text = (
        f"{item.question}\n{_listed(item.options)}\n"
        "Please reason step by step to find the correct choice. At the end of your response, strictly output your "
        "final answer in the exact format: 'The answer is (X)', where X is the letter of the correct choice."
    )
    system = "You are a helpful assistant. You are solving high-level academic problems."
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def extract_choice(response: str, item: Item) -> str | None:
    return choice(response, LETTERS[: len(item.options)], item.options)


def correct_choice(extracted: str, item: Item) -> bool:
    return extracted == item.answer


def choice_item(uid: str, question: str, options: Sequence[str], answer: str, **metadata: object) -> Item:
    """Raises ValueError where the answer is none of the letters."""
    if answer not in LETTERS[: len(options)]:
        raise ValueError(f"{uid}: the answer {answer!r} is none of {LETTERS[: len(options)]}")
    return Item(
        uid, choice_prompt(question, options), answer, {"question": question, "options": list(options), **metadata}
    )
