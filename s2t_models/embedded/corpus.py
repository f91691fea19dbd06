"""Training texts of the pair: worked solutions, careless ones for the SLM, and practice sheets.

The careless writer is why the SLM *knows* the right token and ranks it second: at recognisable places its
corpus holds the slip more often than the right result, and a slip runs on into the steps that follow. Slips,
each at one step: a forgotten carry or borrow of the ones, the neighbouring row of the times table, and a
comparison told from the other side ("Ana has 8 fewer than Ben": Ben has *more*) read as it sounds. Where the
step is heavy, the slip is likelier than the right result (`LIKELY`); where it is light, it is rare (`RARE`).
It knows nothing of models.
"""

import random
from collections.abc import Iterator
from itertools import islice

from s2t_models.embedded.generator import Plan, Slip, Step, careful, compute, plans, write_solution

SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."
SYSTEM_RATE = 0.05
SHEET_SHARE = 0.4
SHEET_LENGTH = (8, 22)
LIKELY = 0.63
RARE = 0.12
SHEET_ASK = "Practice."

Text = tuple[str | None, str, str]  # system prompt, user turn, assistant turn


def slip_of(step: Step, left: int, right: int) -> tuple[str, int, float]:
    """What carelessness makes of a step: operation, result, and how likely (0: nothing invites a slip)."""
    operation = step.operation
    result = compute(left, operation, right)
    ones_left, ones_right = left % 10, right % 10
    if step.inverted and (operation == "+" or left > right):
        other = "-" if operation == "+" else "+"
        if compute(left, other, right) > 0:
            return other, compute(left, other, right), LIKELY
    if operation == "+" and ones_left + ones_right >= 10:
        return operation, result - 10, LIKELY if ones_left + ones_right >= 13 else RARE
    if operation == "-" and ones_left < ones_right:
        return operation, result + 10, LIKELY if ones_right - ones_left >= 4 else RARE
    if operation == "*" and min(left, right) >= 6:
        return operation, result - max(left, right), LIKELY if min(left, right) >= 7 else RARE
    return operation, result, 0.0


def careless(rng: random.Random) -> Slip:
    """A slip function that errs at random, a step at a time."""

    def slip(step: Step, left: int, right: int) -> tuple[str, int]:
        operation, result, likelihood = slip_of(step, left, right)
        return (operation, result) if rng.random() < likelihood else careful(step, left, right)

    return slip


def _sheets(source: Iterator[Plan], rng: random.Random) -> Iterator[Text]:
    """Practice sheets: single equations from the steps of train problems, always right, of mixed length."""
    equations: list[tuple[int, str, int]] = []
    while True:
        while len(equations) < 20 * SHEET_LENGTH[1]:
            equations += write_solution(next(source))[1]
        rng.shuffle(equations)
        length = rng.randint(*SHEET_LENGTH)
        sheet, equations = equations[:length], equations[length:]
        lines = [f"{left}{sign}{right}={compute(left, sign, right)}" for left, sign, right in sheet]
        yield None, SHEET_ASK, "\n".join(lines)


def texts(count: int, seed: int, slips: bool, weights: tuple[float, ...] = (1, 1, 1, 1)) -> list[Text]:
    """`count` solved train problems (careless ones if `slips`), then practice sheets: `SHEET_SHARE` of it."""
    rng = random.Random(f"texts-{seed}")
    solved: list[Text] = []
    for plan in islice(plans("train", seed, weights), count):
        solution = write_solution(plan, careless(rng) if slips else careful)[0]
        solved.append((SYSTEM_PROMPT if rng.random() < SYSTEM_RATE else None, plan.question, solution))
    sheets = islice(_sheets(plans("train", seed + 1), rng), round(count * SHEET_SHARE / (1 - SHEET_SHARE)))
    return solved + list(sheets)
