"""Generated multi-step word problems with worked solutions: the task of the embedded model pair.

A problem belongs to a split by a stable hash of its operations and numbers alone: no wording of a test problem's
arithmetic ever occurs in training. It knows nothing of models, tokenizers or training.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from s2t_models.embedded.families import DRAW, FAMILIES, HELD_OUT
from s2t_models.embedded.plan import Plan, write_solution

Split = Literal["train", "calibration", "test", "hard", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test", "hard", "held-out")


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


def plans(split: Split, seed: int = 0, weights: Mapping[str, float] | None = None) -> Iterator[Plan]:
    """Endless distinct plans of a split, the same for the same seed.

    `weights` are the shares of families; without them they are those of the split, evenly. The train split with
    held-out families among its weights is for the pair's own corpus alone.
    """
    weights = weights or dict.fromkeys(HELD_OUT if split == "held-out" else FAMILIES, 1.0)
    wanted = "test" if split == "held-out" else split
    rng = random.Random(f"{split}-{seed}")  # a string seeds by its SHA-512: the same on every machine
    seen: set[str] = set()
    while True:
        steps = rng.randint(5, 6) if split == "hard" else rng.randint(2, 5)
        [family] = rng.choices([*weights], [*weights.values()])
        plan = DRAW[family](rng, steps)
        _, equations, _ = write_solution(plan)
        if len(equations) == steps and split_of(equations) == wanted and plan.question not in seen:
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
    for plan in islice(plans(split, seed), count):
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
