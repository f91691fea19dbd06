"""A problem before it is written: its question, and its steps as operations on numbers.

`write_solution` runs a plan and writes it out. How a step is answered is a function, so that the careless writer
of `corpus` runs the same plans with slips.
"""

import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from s2t_models.embedded import wording

Operation = Literal["+", "-", "*", "/"]
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
DISTRACTOR_RATE = 0.2


@dataclass(frozen=True)
class Ref:
    """An operand that is the result of an earlier step."""

    step: int


@dataclass(frozen=True)
class Step:
    """One equation of a plan. `sentence` holds `{equation}`; `inverted`: compared from the known's side."""

    left: int | Ref
    operation: Operation
    right: int | Ref
    sentence: str
    inverted: bool = False


@dataclass(frozen=True)
class Plan:
    """A problem before it is written: question, steps, and the solution's last sentence (with `{answer}`)."""

    family: str
    question: str
    steps: tuple[Step, ...]
    closing: str


def compute(left: int, operation: str, right: int) -> int:
    """The result of one equation; a division that careless numbers leave uneven is rounded down."""
    return OPERATIONS[operation](left, right)


Slip = Callable[[Step, int, int], tuple[str, int]]


def careful(step: Step, left: int, right: int) -> tuple[str, int]:
    return step.operation, compute(left, step.operation, right)


def write_solution(plan: Plan, slip: Slip = careful) -> tuple[str, list[tuple[int, str, int]], int]:
    """The solution's text, equations (left, operation, right) and answer; `slip` says what a step gives."""
    results: list[int] = []
    equations: list[tuple[int, str, int]] = []
    sentences: list[str] = []
    for step in plan.steps:
        left, right = (results[x.step] if isinstance(x, Ref) else x for x in (step.left, step.right))
        operation, result = slip(step, left, right)
        results.append(result)
        equations.append((left, operation, right))
        sentences.append(step.sentence.replace("{equation}", f"{left}{operation}{right}={result}"))
    closing = plan.closing.replace("{answer}", f"\\boxed{{{results[-1]}}}")
    return " ".join([*sentences, closing]), equations, results[-1]


class PlanWriter:
    """Draws one plan: keeps the random source, the sentences and the running values."""

    def __init__(self, rng: random.Random, family: str) -> None:
        self.rng, self.family = rng, family
        self.told: list[str] = []
        self.steps: list[Step] = []
        self.values: list[int] = []

    def pick(self, options: Sequence[str], **fields: object) -> str:
        return self.rng.choice(options).format(**fields)

    def tell(self, options: Sequence[str], **fields: object) -> None:
        self.told.append(self.pick(options, **fields))

    def value(self, operand: int | Ref) -> int:
        return self.values[operand.step] if isinstance(operand, Ref) else operand

    def rises(self, held: int | Ref) -> bool:
        """Whether the running value goes up next: results stay between 3 and 99."""
        now = self.value(held)
        return now < 12 or (now <= 90 and self.rng.random() < 0.5)

    def step(
        self,
        left: int | Ref,
        operation: Operation,
        right: int | Ref,
        options: Sequence[str],
        inverted: bool = False,
        **fields: object,
    ) -> Ref:
        sentence = self.pick(options, **fields).replace("[[", "{").replace("]]", "}")
        self.steps.append(Step(left, operation, right, sentence, inverted))
        self.values.append(compute(self.value(left), operation, self.value(right)))
        return Ref(len(self.values) - 1)

    def finish(self, options: Sequence[str], **fields: object) -> Plan:
        if self.rng.random() < DISTRACTOR_RATE:
            place, name = self.rng.randint(1, len(self.told)), self.rng.choice(wording.NAMES)
            self.told.insert(place, self.pick(wording.DISTRACTORS, name=name, n=self.rng.randint(3, 60)))
        question = " ".join([*self.told, self.pick(options, **fields)])
        return Plan(self.family, question, tuple(self.steps), self.rng.choice(wording.CLOSINGS))
