"""Maj@n: the response whose answer most samples give, by option letter where there are options, else by value or
spelling.

A tie goes to the answer seen first. Samples without an answer do not vote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from s2t_models.answers.choices import LETTERS, choice
from s2t_models.answers.final_answer import final_answer
from s2t_models.answers.latex_text import canonical
from s2t_models.answers.numbers import number


def vote(responses: Sequence[str], options: Sequence[str] = ()) -> int:
    """The index of the first response that gives the majority answer; 0 where none has an answer.

    Args:
        options: the texts of the options A, B, ... where the question is one of multiple choice.
    """
    keys = [vote_key(response, options) for response in responses]
    counts = Counter(key for key in keys if key is not None)
    # Counter keeps the order of first sight, and max takes the first of equals.
    return keys.index(max(counts, key=counts.__getitem__)) if counts else 0


def vote_key(response: str, options: Sequence[str] = ()) -> str | None:
    """What a response votes for: a letter, or one text for all spellings of a number and for what differs in dressing
    alone. None where it has no answer."""
    if options:
        return choice(response, LETTERS[: len(options)], options)
    answer = final_answer(response)
    if answer is None:
        return None
    value = number(answer)
    # In hexadecimal: Python refuses to write long integers in decimal.
    return canonical(answer) if value is None else f"{value.numerator:x}/{value.denominator:x}"
