"""What a benchmark task is: where its rows come from, its prompt, how an answer is found and graded, how long it may
be.

Each task is one short file that builds one `Task`. A task knows nothing of policies, engines or Ray.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.grading.judge import Ask
from pipelines.tasks.source import Source
from s2t_models.answers.voting import vote
from s2t_models.errors import UserError, one_line

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

    @property
    def options(self) -> list[str]:
        """The options' texts in the order of their letters; empty where there are none."""
        return list(self.metadata.get("options", ()))


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
        judge: grades a conversation by asking a judge model, in place of `extract` and `correct`.
        published: an item's prompt in the words of the authors' code, where that has the task.
        prepare: this task as the system can grade it, given whether model-written code may run without isolation.
        max_new_tokens: generation limit of one turn.
        turns: user turns a conversation; what follows the first stands in `metadata["turns"]`.
        votes: whether answers are short texts that can be compared, and voted over (not programs or essays).
        most_options: options of a multiple-choice question at most; 0 where there are none.
        stratify: metadata key that sampled rows are spread over.
    """

    name: str
    sources: tuple[Source, ...]
    read: Callable[[list[list[dict[str, Any]]]], list[Item]]
    extract: Callable[[str, Item], str | None] = lambda response, item: response
    correct: Callable[[str, Item], bool] = lambda extracted, item: False
    judge: Callable[[Sequence[str], Item, Ask], Graded] | None = None
    published: Callable[[Item], list[Message]] | None = None
    prepare: Callable[[Task, bool], Task] = lambda task, allow_unsandboxed: task
    max_new_tokens: int = 1024
    turns: int = 1
    votes: bool = True
    most_options: int = 0
    stratify: str | None = None

    @property
    def judged(self) -> bool:
        """Whether grading asks a judge model."""
        return self.judge is not None

    def prepared(self, allow_unsandboxed: bool = False) -> Task:
        """The task as this system can grade it. Raises UserError where it cannot, so that no answer is paid for in
        vain.

        Args:
            allow_unsandboxed: run model-written code with this user's rights where the system isolates none.
        """
        return self.prepare(self, allow_unsandboxed)

    def load(self, data_dir: Path | str | None = None) -> list[Item]:
        """All rows, from `data_dir` where one is given, else from their pinned place on the network.

        Raises:
            FileNotFoundError: `data_dir` lacks a file of this task.
            ValueError: a file is malformed.
        """
        return self.read([source.rows(None if data_dir is None else Path(data_dir)) for source in self.sources])

    def worded(self, items: Sequence[Item], prompts: str) -> list[Item]:
        """The items with their prompts as a recipe's `prompts` asks for."""
        if prompts != "published" or self.published is None:
            return list(items)
        return [replace(item, prompt=self.published(item)) for item in items]

    def grade(self, outputs: str | Sequence[str], item: Item, finish: str = "end", ask: Ask | None = None) -> Graded:
        """Grades one response: a text, or one text a turn. It raises nothing for what a model wrote; a grader or judge
        that fails makes the row errored, with the reason.

        Args:
            finish: "length" (cut off at the token limit) turns what is not correct into truncated.
            ask: the judge, where the task is `judged`.

        Raises:
            UserError: the task is judged, and there is no judge.
        """
        texts = [outputs] if isinstance(outputs, str) else list(outputs)
        if self.judge is not None and ask is None:
            raise UserError(f"{self.name} is graded by a judge model: name one with --judge URL --judge-model NAME")
        try:
            if self.judge is not None and ask is not None:
                return self.judge(texts, item, ask)
            extracted = self.extract(texts[-1], item)
            if extracted is not None and self.correct(extracted, item):
                return Graded("correct", extracted, 1.0)
        except Exception as error:
            return Graded("errored", None, 0.0, f"the grader failed: {type(error).__name__}: {one_line(error)}")
        return Graded("truncated" if finish == "length" else "wrong", extracted, 0.0)

    def vote(self, responses: Sequence[str], item: Item) -> str:
        """The response that maj@n serves: one that gives the majority answer."""
        return responses[vote(responses, item.options)]

    def sample(self, items: Sequence[Item], count: int, seed: int) -> list[Item]:
        """`count` rows drawn with the seed, in their order; spread over `stratify` in proportion. All rows for 0 or
        more than there are."""
        return sample(items, count, seed, self.stratify)


def sample(items: Sequence[Item], count: int, seed: int, stratify: str | None = None) -> list[Item]:
    """See `Task.sample`. Shares that are no whole numbers go to the largest remainders, ties in the order of the
    strata's names."""
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
