"""The problems as a task of inspect_ai."""

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.scorer import pattern
from inspect_ai.solver import generate


@task
def s2t_problems() -> Task:
    dataset = json_dataset("problems.jsonl", FieldSpec(input="question", target="answer"))
    return Task(dataset=dataset, solver=generate(), scorer=pattern(r"boxed\{(\d+)\}"))
