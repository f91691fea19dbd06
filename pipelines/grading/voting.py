"""Maj@n: the answer that most samples give.

Votes are cast by extracted, normalised answers; a tie goes to the answer seen first. Samples without an answer do not vote. The winner is graded
like a single answer: that any sample is right (pass@n) is another metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def vote(
    answers: Sequence[str | None], key: Callable[[str], str], same: Callable[[str, str], bool] | None = None
) -> str | None:
    """The winning answer as its first voter wrote it, or None where no sample has one.

    Args:
        answers: the extracted answers in the order of the samples.
        key: one spelling for answers that are the same as text.
        same: whether two answers of different spelling are the same.
    """
    groups: list[tuple[str, set[str], int]] = []
    for answer in answers:
        if answer is None:
            continue
        spelling = key(answer)
        place = next((i for i, (_, spellings, _) in enumerate(groups) if spelling in spellings), None)
        if place is None and same is not None:
            place = next((i for i, (first, _, _) in enumerate(groups) if same(first, answer)), None)
        if place is None:
            groups.append((answer, {spelling}, 1))
        else:
            first, spellings, count = groups[place]
            groups[place] = (first, spellings | {spelling}, count + 1)
    return max(groups, key=lambda group: group[2])[0] if groups else None
