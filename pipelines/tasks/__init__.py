"""Benchmark tasks by name."""

from __future__ import annotations

from pipelines.tasks import arc_challenge, gsm8k, humaneval, math500, mmlu_pro, mt_bench, olympiadbench, truthfulqa
from pipelines.tasks.aime import AIME24, AIME25
from pipelines.tasks.base import VERDICTS, Graded, Item, Task, Verdict, sample
from pipelines.tasks.embedded import EMBEDDED
from pipelines.tasks.hendrycks_math import MATH_CALIBRATION, MATH_TRAIN

__all__ = ["TASKS", "VERDICTS", "Graded", "Item", "Task", "Verdict", "sample", "task"]

_BY_NAME: dict[str, Task] = {
    entry.name: entry
    for entry in (
        gsm8k.TASK,
        math500.TASK,
        olympiadbench.TASK,
        AIME24,
        AIME25,
        humaneval.TASK,
        mmlu_pro.TASK,
        arc_challenge.TASK,
        truthfulqa.TASK,
        mt_bench.TASK,
        MATH_TRAIN,
        MATH_CALIBRATION,
        *EMBEDDED,
    )
}
TASKS: tuple[str, ...] = tuple(_BY_NAME)


def task(name: str) -> Task:
    """The task of that name. Raises ValueError for an unknown one."""
    if name not in _BY_NAME:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return _BY_NAME[name]
