"""Benchmark tasks by name."""

from __future__ import annotations

from pathlib import Path

from pipelines.tasks import arc_challenge, humaneval, math500, mmlu_pro, mt_bench, olympiadbench, truthfulqa
from pipelines.tasks.aime import AIME24, AIME25
from pipelines.tasks.base import VERDICTS, Graded, Item, Task, Verdict, sample
from pipelines.tasks.embedded import EMBEDDED
from pipelines.tasks.gsm8k import GSM8K, GSM8K_CALIBRATION, GSM8K_TRAIN
from pipelines.tasks.hendrycks_math import MATH_CALIBRATION, MATH_TRAIN
from s2t_models.errors import UserError

__all__ = ["TASKS", "VERDICTS", "Graded", "Item", "Task", "TaskError", "Verdict", "load", "sample", "task"]

_BY_NAME: dict[str, Task] = {
    entry.name: entry
    for entry in (
        GSM8K,
        math500.TASK,
        olympiadbench.TASK,
        AIME24,
        AIME25,
        humaneval.TASK,
        mmlu_pro.TASK,
        arc_challenge.TASK,
        truthfulqa.TASK,
        mt_bench.TASK,
        GSM8K_TRAIN,
        GSM8K_CALIBRATION,
        MATH_TRAIN,
        MATH_CALIBRATION,
        *EMBEDDED,
    )
}
TASKS: tuple[str, ...] = tuple(_BY_NAME)


class TaskError(UserError):
    """A task that there is not, or whose rows cannot be had."""


def load(name: str, data: Path | None, prompts: str = "own") -> tuple[Task, list[Item]]:
    """The task of that name and all its rows, asked in the words that `prompts` of a recipe names. Raises TaskError."""
    chosen = task(name)
    try:
        return chosen, chosen.worded(chosen.load(data), prompts)
    except (KeyError, ValueError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        raise TaskError(f"task {name}: {' '.join(str(reason).split())}") from None


def task(name: str) -> Task:
    """The task of that name. Raises TaskError for an unknown one."""
    if name not in _BY_NAME:
        raise TaskError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return _BY_NAME[name]
