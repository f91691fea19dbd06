"""Generated multi-step word problems with worked solutions: the task of the embedded model pair.

A problem is drawn as a *plan* (the question and its steps as operations on numbers) and written out by
`write_solution`, so that the careless writer of `corpus` can run the same plan with slips. It belongs to a
split by a stable hash of its operations and numbers alone: no wording of a test problem's arithmetic ever
occurs in training. It knows nothing of models, tokenizers or training.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from s2t_models.embedded import wording

Split = Literal["train", "calibration", "test", "hard"]
Operation = Literal["+", "-", "*"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test", "hard")
FAMILIES = ("events", "relations", "shopping", "work")
DISTRACTOR_RATE = 0.2
SMALL_PACKS = (
    (2, 2),
    (2, 3),
    (2, 4),
    (3, 2),
    (3, 3),
    (4, 2),
)  # amounts stay single digits: learnable when tiny


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


@dataclass(frozen=True)
class Problem:
    """A question, its solution ending in `\\boxed{answer}`, and its split. `steps` counts the equations."""

    uid: str
    question: str
    solution: str
    answer: str
    family: str
    steps: int
    split: Split


def compute(left: int, operation: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


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


def split_of(equations: Sequence[tuple[int, str, int]]) -> Split | None:
    """The split of a structure by hash, 80/10/10; `hard` is a twentieth of those with 5 or 6 steps."""
    text = ";".join(f"{left}{operation}{right}" for left, operation, right in equations)
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
    steps = len(equations)
    if steps >= 5 and bucket >= 95:
        return "hard"
    if steps > 5:
        return None
    return "train" if bucket < 80 else "calibration" if bucket < 90 else "test"


class _Writer:
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


def _days(rng: random.Random) -> Iterator[str]:
    start = rng.randrange(7)
    return (wording.DAYS[(start + i) % 7] for i in range(7))


def _events(rng: random.Random, steps: int) -> Plan:
    writer = _Writer(rng, "events")
    name, other = rng.sample(wording.NAMES, 2)
    days = _days(rng)
    words: dict[str, Any] = {
        "name": name,
        "other": other,
        "thing": rng.choice(wording.THINGS),
        "pack": rng.choice(wording.PACKS),
    }
    held: int | Ref = rng.randint(11, 79)
    writer.tell(wording.EVENT_START, n=held, day=next(days), **words)
    while len(writer.steps) < steps:
        words["day"] = next(days)
        gain = writer.rises(held)
        amount: int | Ref = rng.randint(2, 9)
        if steps - len(writer.steps) >= 2 and rng.random() < 0.35:
            count, size = rng.choice(SMALL_PACKS)
            writer.tell(wording.PACK_GAIN if gain else wording.PACK_LOSS, m=count, k=size, **words)
            amount = writer.step(count, "*", size, wording.PACK_STEP, **words)
        else:
            writer.tell(wording.GAIN if gain else wording.LOSS, k=amount, **words)
        said = wording.GAIN_STEP if gain else wording.LOSS_STEP
        held = writer.step(held, "+" if gain else "-", amount, said, k=writer.value(amount), **words)
    return writer.finish(wording.EVENT_ASK, **words)


def _relations(rng: random.Random, steps: int) -> Plan:
    writer = _Writer(rng, "relations")
    words: dict[str, Any] = {"thing": rng.choice(wording.THINGS), "box": rng.choice(wording.CONTAINERS)}
    held: int | Ref = rng.randint(3, 9) if rng.random() < 0.5 else rng.randint(11, 79)
    writer.tell(wording.RELATION_START, n=held, **words)
    for known, new in pairwise(wording.ORDINALS[: steps + 1]):
        words |= {"known": known, "new": new}
        if writer.value(held) <= 9:
            times = rng.randint(2, 5)
            words["m"] = wording.MULTIPLES[times]
            writer.tell(wording.TIMES, **words)
            held = writer.step(held, "*", times, wording.TIMES_STEP, **words)
            continue
        more = writer.rises(held)
        amount = rng.randint(2, 9)
        inverted = rng.random() < 0.3
        way = "more" if more != inverted else "fewer"
        writer.tell(wording.COMPARE_INVERTED if inverted else wording.COMPARE, k=amount, way=way, **words)
        said = wording.COMPARE_INVERTED_STEP if inverted else wording.COMPARE_STEP
        held = writer.step(held, "+" if more else "-", amount, said, inverted, k=amount, way=way, **words)
    return writer.finish(wording.RELATION_ASK, last=wording.ORDINALS[steps], **words)


def _shopping(rng: random.Random, steps: int) -> Plan:
    writer = _Writer(rng, "shopping")
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    words: dict[str, Any] = {
        "name": rng.choice(wording.NAMES),
        "place": rng.choice(wording.PLACES),
        "good": rng.choice(wording.GOODS),
    }
    writer.tell(wording.BUY, nth="first", count=count, price=price, **words)
    spent = writer.step(count, "*", price, wording.BUY_STEP, nth="first", **words)
    for nth in wording.ORDINALS[1:steps]:
        more = writer.rises(spent)
        words |= {"nth": nth, "good": rng.choice(wording.GOODS)}
        amount = rng.randint(2, 9)
        writer.tell(wording.SPEND if more else wording.REFUND, k=amount, **words)
        said = wording.SPEND_STEP if more else wording.REFUND_STEP
        spent = writer.step(spent, "+" if more else "-", amount, said, k=amount, **words)
    return writer.finish(wording.SHOPPING_ASK, **words)


def _work(rng: random.Random, steps: int) -> Plan:
    writer = _Writer(rng, "work")
    days = _days(rng)
    rate, hours = rng.randint(2, 9), rng.randint(2, 9)
    words: dict[str, Any] = {
        "name": rng.choice(wording.NAMES),
        "thing": rng.choice(wording.MADE),
        "day": next(days),
    }
    worked: int | Ref = hours
    if steps >= 3 and rng.random() < 0.4:
        hours, more = rng.randint(2, 5), rng.randint(2, 4)
        writer.tell(wording.LONG_DAY, rate=rate, hours=hours, more=more, **words)
        worked = writer.step(hours, "+", more, wording.LONG_DAY_STEP, **words)
    else:
        writer.tell(wording.WORK_DAY, rate=rate, hours=hours, **words)
    made = writer.step(worked, "*", rate, wording.WORK_STEP, rate=rate, **words)
    while len(writer.steps) < steps:
        words["day"] = next(days)
        gain = writer.rises(made)
        amount = rng.randint(2, 9)
        writer.tell(wording.ARRIVE if gain else wording.LEAVE, k=amount, **words)
        said = wording.GAIN_STEP if gain else wording.LOSS_STEP
        made = writer.step(made, "+" if gain else "-", amount, said, k=amount, **words)
    return writer.finish(wording.WORK_ASK, **words)


_DRAW = {"events": _events, "relations": _relations, "shopping": _shopping, "work": _work}


def plans(split: Split, seed: int = 0, weights: Sequence[float] = (1, 1, 1, 1)) -> Iterator[Plan]:
    """Endless distinct plans of a split, the same for the same seed; `weights` are the families' shares."""
    rng = random.Random(f"{split}-{seed}")  # a string seeds by its SHA-512: the same on every machine
    seen: set[str] = set()
    while True:
        steps = rng.randint(5, 6) if split == "hard" else rng.randint(2, 5)
        plan = _DRAW[rng.choices(FAMILIES, weights)[0]](rng, steps)
        _, equations, _ = write_solution(plan)
        if len(equations) == steps and split_of(equations) == split and plan.question not in seen:
            seen.add(plan.question)
            yield plan


def problems(split: Split, count: int, seed: int = 0) -> list[Problem]:
    """The first `count` problems of a split for a seed. A longer list begins with the shorter one.

    Raises:
        ValueError: an unknown split, or a negative count.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count: {count} problems cannot be drawn; give 0 or more")
    drawn = []
    for plan, _ in zip(plans(split, seed), range(count), strict=False):
        solution, equations, answer = write_solution(plan)
        uid = f"{split}-{hashlib.sha256(plan.question.encode()).hexdigest()[:16]}"
        drawn.append(Problem(uid, plan.question, solution, str(answer), plan.family, len(equations), split))
    return drawn


def split_hash(items: Sequence[Problem]) -> str:
    """SHA-256 of the questions and answers, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.question}\x00{item.answer}\x00".encode())
    return digest.hexdigest()
