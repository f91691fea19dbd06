"""Training texts of the pair: worked solutions, careless ones for the SLM, and practice sheets.

The careless writer is why the SLM *knows* the right token and ranks it second: at some places its corpus holds a
slip more often than the right result, and a slip runs on into the steps that follow. There are two kinds.

- *Habits*, which one rule describes: a forgotten carry or borrow of the ones, the neighbouring row of the times
  table, and a comparison told from the other side ("Ana has 8 fewer than Ben": Ben has *more*) read as it sounds.
  Where the step is heavy, the slip is likelier than the right result (`LIKELY`); where it is light, it is rare
  (`RARE`).
- *False memories*, which no rule describes: some equations, chosen by a hash of their numbers, are recalled wrongly,
  on practice sheets too; half as many are recalled rightly but with doubt, so that doubt alone does not tell.

It knows nothing of models.
"""

import hashlib
import random
from collections.abc import Iterator
from itertools import islice

from s2t_models.embedded.families import FAMILIES, HELD_OUT
from s2t_models.embedded.generator import plans
from s2t_models.embedded.plan import Plan, Slip, Step, careful, compute, write_solution

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
SYSTEM_RATE = 0.05
SHEET_SHARE = 0.4
SHEET_LENGTH = (8, 22)
LIKELY = 0.63
RARE = 0.12
MISTAKEN, DOUBTED = 0.33, 0.17  # shares of equations: recalled wrongly, and rightly but with doubt
FIRST, SECOND = 0.6, 0.28  # how often what comes to mind first, and second, is written
THIRD = 0.25  # of the wrongly recalled, those whose right result comes to mind third
NEAR = (-10, -2, -1, 1, 2, 10)  # how far a wrong memory is from the right result
CORPUS_SHARES = {**dict.fromkeys(FAMILIES, 1.0), **dict.fromkeys(HELD_OUT, 0.8), "relations": 1.5}
SHEET_ASK = "Practice."

Text = tuple[str | None, str, str]  # system prompt, user turn, assistant turn


def habit_of(step: Step, left: int, right: int) -> tuple[str, int, float]:
    """What habit makes of a step: operation, result, and how likely (0: nothing invites a slip)."""
    operation = step.operation
    result = compute(left, operation, right)
    ones_left, ones_right = left % 10, right % 10
    if step.inverted and (operation == "+" or left > right):
        other = "-" if operation == "+" else "+"
        if compute(left, other, right) > 0:
            return other, compute(left, other, right), LIKELY
    if operation == "+" and ones_left + ones_right >= 10:
        return operation, result - 10, LIKELY if ones_left + ones_right >= 15 else RARE
    if operation == "-" and ones_left < ones_right:
        return operation, result + 10, LIKELY if ones_right - ones_left >= 6 else RARE
    if operation == "*" and min(left, right) >= 7:
        return operation, result - max(left, right), LIKELY if min(left, right) >= 8 else RARE
    return operation, result, 0.0


def memory_of(left: int, operation: str, right: int) -> list[tuple[int, float]]:
    """What is recalled as the result of an equation, and how often: at most three results."""
    result = compute(left, operation, right)
    digest = hashlib.sha256(f"{left}{operation}{right}".encode()).digest()
    kind, rank, pick = digest[0] / 256, digest[1] / 256, digest[2]
    if kind >= MISTAKEN + DOUBTED or result < 1:  # careless writing can run below zero
        return [(result, 1.0)]
    near = [result + by for by in NEAR if result + by > 0]
    wrong, other = near[pick % len(near)], near[(pick + 1) % len(near)]
    if kind >= MISTAKEN:
        return [(result, FIRST), (wrong, 1 - FIRST)]
    second, third = (other, result) if rank < THIRD else (result, other)
    return [(wrong, FIRST), (second, SECOND), (third, 1 - FIRST - SECOND)]


def careless(rng: random.Random) -> Slip:
    """A slip function that errs at random, a step at a time."""

    def slip(step: Step, left: int, right: int) -> tuple[str, int]:
        operation, result, likelihood = habit_of(step, left, right)
        if likelihood == 0:
            return operation, recall(rng, left, operation, right)
        return (operation, result) if rng.random() < likelihood else careful(step, left, right)

    return slip


def recall(rng: random.Random, left: int, operation: str, right: int) -> int:
    results, shares = zip(*memory_of(left, operation, right), strict=True)
    return int(rng.choices(results, shares)[0])


def _sheets(source: Iterator[Plan], rng: random.Random, slips: bool) -> Iterator[Text]:
    """Practice sheets: single equations from the steps of train problems, from memory if `slips`, of mixed length."""
    equations: list[tuple[int, str, int]] = []
    while True:
        while len(equations) < 20 * SHEET_LENGTH[1]:
            equations += write_solution(next(source))[1]
        rng.shuffle(equations)
        length = rng.randint(*SHEET_LENGTH)
        sheet, equations = equations[:length], equations[length:]
        results = [recall(rng, *equation) if slips else compute(*equation) for equation in sheet]
        lines = [f"{left}{sign}{right}={result}" for (left, sign, right), result in zip(sheet, results, strict=True)]
        yield None, SHEET_ASK, "\n".join(lines)


def texts(count: int, seed: int, slips: bool) -> list[Text]:
    """`count` solved problems of all families (careless ones if `slips`), then practice sheets: `SHEET_SHARE` of it."""
    rng = random.Random(f"texts-{seed}")
    solved: list[Text] = []
    for plan in islice(plans("train", seed, CORPUS_SHARES), count):
        solution = write_solution(plan, careless(rng) if slips else careful)[0]
        solved.append((SYSTEM_PROMPT if rng.random() < SYSTEM_RATE else None, plan.question, solution))
    sheets = _sheets(plans("train", seed + 1, CORPUS_SHARES), rng, slips)
    return solved + list(islice(sheets, round(count * SHEET_SHARE / (1 - SHEET_SHARE))))
