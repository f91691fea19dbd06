"""What a benchmark task is: where its rows come from, its prompt, how an answer is found and graded, how long it may be.

Each task is one short file that builds one `Task`. A task knows nothing of policies, engines or Ray.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.grading.voting import vote
from pipelines.tasks.source import Source

Verdict = Literal["correct", "wrong", "truncated", "errored"]
VERDICTS: tuple[Verdict, ...] = ("correct", "wrong", "truncated", "errored")
Message = dict[str, str]

MATHS_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Item:
    """One row of a benchmark.

    Attributes:
        uid: unique over all tasks, `task/row`.
        prompt: the chat messages of the first turn.
        answer: the gold answer; several where the row lists several ways to write it.
        metadata: the question's text as `question`, and what the grader needs (tolerance, options, tests, ...).
    """

    uid: str
    prompt: list[Message]
    answer: str | list[str]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        return str(self.metadata.get("question") or self.prompt[-1]["content"])


@dataclass(frozen=True)
class Graded:
    """What a response answers, and whether that is right. `score` is 1 or 0, or a judge's rating from 0 to 1."""

    verdict: Verdict
    extracted: str | None
    score: float
    detail: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        sources: the files its rows come from.
        read: rows of the sources, one list a source, to items.
        extract: the answer that a response gives for an item, or None.
        correct: whether an extracted answer is right for an item.
        vote_key: one spelling for answers that are the same as text (maj@n).
        same: whether two extracted answers of one item are the same beyond their spelling.
        max_new_tokens: generation limit of one turn.
        turns: user turns a conversation; what follows the first stands in `metadata["turns"]`.
        votes: whether maj@n makes sense (not for programs or essays).
        judged: graded by a judge model (`mt_bench.judged`), not by `grade`.
        stratify: metadata key that sampled rows are spread over.
    """

    name: str
    sources: tuple[Source, ...]
    read: Callable[[list[list[dict[str, Any]]]], list[Item]]
    extract: Callable[[str, Item], str | None]
    correct: Callable[[str, Item], bool]
    vote_key: Callable[[str], str] = str
    same: Callable[[str, str], bool] | None = None
    max_new_tokens: int = 1024
    turns: int = 1
    votes: bool = True
    judged: bool = False
    stratify: str | None = None

    def load(self, data_dir: Path | str | None = None) -> list[Item]:
        """All rows, from `data_dir` where one is given, else from their pinned place on the network.

        Raises:
            FileNotFoundError: `data_dir` lacks a file of this task.
            ValueError: a file is malformed.
        """
        return self.read([source.rows(None if data_dir is None else Path(data_dir)) for source in self.sources])

    def grade(self, response: str, item: Item, finish: str = "end") -> Graded:
        """Grades one response. `finish` "length" (cut off at the token limit) turns what is not correct into truncated."""
        return self.grade_answer(self.extract(response, item), item, finish)

    def grade_vote(self, responses: Sequence[str], item: Item, finish: str = "end") -> Graded:
        """Votes over the responses (maj@n), then grades the answer that won."""
        answers = [self.extract(response, item) for response in responses]
        return self.grade_answer(vote(answers, self.vote_key, self.same), item, finish)

    def grade_answer(self, extracted: str | None, item: Item, finish: str = "end") -> Graded:
        """Grades an answer that is already extracted."""
        if extracted is not None and self.correct(extracted, item):
            return Graded("correct", extracted, 1.0)
        return Graded("truncated" if finish == "length" else "wrong", extracted, 0.0)

    def sample(self, items: Sequence[Item], count: int, seed: int) -> list[Item]:
        """`count` rows drawn with the seed, in their order; spread over `stratify` in proportion. All rows for 0 or more than there are."""
        return sample(items, count, seed, self.stratify)


def sample(items: Sequence[Item], count: int, seed: int, stratify: str | None = None) -> list[Item]:
    """See `Task.sample`. Shares that are no whole numbers go to the largest remainders, ties in the order of the strata's names."""
    if count <= 0 or count >= len(items):
        return list(items)
    strata: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        strata[str(item.metadata[stratify]) if stratify else ""].append(index)
    names = sorted(strata)
    quotas = {name: divmod(count * len(strata[name]), len(items)) for name in names}
    extra = sorted(names, key=lambda name: (-quotas[name][1], name))[
        : count - sum(whole for whole, _ in quotas.values())
    ]
    chosen: list[int] = []
    for name in names:
        rng = random.Random(f"{seed}/{name}")
        chosen += rng.sample(strata[name], quotas[name][0] + (name in extra))
    return [items[index] for index in sorted(chosen)]
