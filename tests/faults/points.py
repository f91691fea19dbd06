"""A point: one fault at a moment drawn from the seed, and what was lost by it; and which points are run together."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from .injections import FAULTS, OF_STAGE, Fault
from .stages import STAGES, Stage

#: The moment of a fault that came too late.
MISSED = "none: it had ended before"


@dataclass(frozen=True)
class Point:
    """What became of a point. `trial` is the number of the first point of its run, which the points of a trial share:
    what the run's output lost is noted with the last of them. `line` is the last that the command said where it ended
    with an error after this fault; `unclear` counts lines that do not say what to do; `reruns` are those of the same
    command before the next fault, or the end."""

    stage: str
    fault: str
    number: int
    trial: int
    moment: str
    struck: str
    lost: int
    differing: int
    unclear: int
    reruns: int
    seconds: float
    line: str

    def __str__(self) -> str:
        lost = f"lost {self.lost}, differing {self.differing}, reruns {self.reruns}, {self.seconds:.0f} s"
        said = f": {self.line}" if self.line else ""
        return f"{self.stage} #{self.number} {self.fault} ({self.struck or '-'}) at {self.moment}: {lost}{said}"


@dataclass(frozen=True)
class Trial:
    """The points of one run of a stage: its faults, and their numbers."""

    stage: Stage
    faults: tuple[Fault, ...]
    numbers: tuple[int, ...]


def plan(stages: list[str], faults: list[str], count: int) -> list[Trial]:
    """`count` points a stage, its faults in turn; those of `faults` alone where any are given. Each round of a stage's
    faults is one run with those that can strike one run, and a run for each of the others."""
    rounds: list[tuple[int, Trial]] = []
    for name in stages:
        chosen = [fault for fault in OF_STAGE[name] if not faults or fault in faults]
        for start in range(0, count if chosen else 0, len(chosen)):
            numbered = [(FAULTS[fault], start + index) for index, fault in enumerate(chosen) if start + index < count]
            together = [pair for pair in numbered if not pair[0].alone]
            for pairs in filter(None, [together, *([pair] for pair in numbered if pair[0].alone)]):
                one, numbers = zip(*pairs, strict=True)
                rounds.append((start // len(chosen), Trial(STAGES[name], one, numbers)))
    return [trial for _, trial in sorted(rounds, key=lambda pair: pair[0])]


def table(points: list[Point]) -> str:
    """How many points of each fault each stage had, and what was lost by them, as Markdown; points whose run had ended
    before the fault came are left out."""
    points = [point for point in points if point.moment != MISSED]
    stages = [name for name in STAGES if any(point.stage == name for point in points)]
    sums = {"lost rows": "lost", "differing rows": "differing", "unclear errors": "unclear", "reruns": "reruns"}
    lines = [f"| {' | '.join(('fault', *stages, *sums))} |", f"|---|{'---:|' * (len(stages) + len(sums))}"]
    for fault in (*sorted({point.fault for point in points}), "all"):
        own = [point for point in points if fault in ("all", point.fault)]
        counts = Counter(point.stage for point in own)
        totals = (sum(getattr(point, name) for point in own) for name in sums.values())
        lines.append(f"| {' | '.join(map(str, (fault, *(counts[name] or '' for name in stages), *totals)))} |")
    return "\n".join(lines)


def record(point: Point, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")


def recorded(path: Path) -> list[Point]:
    return [Point(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []
