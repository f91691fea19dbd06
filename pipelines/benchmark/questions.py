"""The questions of a benchmark job: items drawn from tasks, kept apart from training rows, times policies and
seeds.

It knows what is asked, with which seed and under which cache key; not how it is asked or graded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.benchmark.answer_log import Question
from pipelines.tasks import Item, Task, TaskError, load
from pipelines.tasks.splits import fingerprint, refuse_overlap
from s2t_models.artifact import read_provenance
from s2t_models.errors import UserError
from s2t_models.hosting import calibration, trained_folders
from s2t_models.recipe import Recipe
from s2t_models.storage import location

#: Characters of a token, about; no tokenizer is at hand for another's endpoint.
CHARACTERS = 4


class QuestionError(UserError):
    """Questions that cannot be asked; the message is one line."""


def load_items(recipe: Recipe, data: Path | None) -> list[tuple[Task, list[Item]]]:
    """The tasks of the recipe with the items drawn from each, and its limit of answers where that is below theirs.
    Raises TaskError where a task or its rows are missing."""
    chosen = []
    for name in recipe.benchmark.task:
        loaded, items = load(name, data, recipe.prompts)
        limit = recipe.benchmark.max_new_tokens or loaded.max_new_tokens
        loaded = replace(loaded, max_new_tokens=min(limit, loaded.max_new_tokens))
        chosen.append((loaded, loaded.sample(items, recipe.benchmark.items, recipe.seed)))
    return chosen


def check_splits(recipe: Recipe, chosen: Sequence[tuple[Task, list[Item]]], data: Path | None) -> dict[str, str]:
    """Refuse test rows that were trained or calibrated on; returns the sha256 of each set of rows, by name.

    Training rows are those that what the recipe names records; where nothing records any, those the recipe collects.
    Raises QuestionError naming the sets and rows that overlap."""
    sets: dict[str, Mapping[str, str]] = {f"test ({test.name})": fingerprint(items) for test, items in chosen}
    training = recorded_rows(recipe) or {f"training ({recipe.collect.task})": _collected(recipe, data)}
    try:
        for name, rows in sets.items():
            for other, hashes in training.items():
                refuse_overlap({other: hashes, name: rows})
    except ValueError as error:
        raise QuestionError(str(error)) from None
    everything: dict[str, Any] = sets | training
    return {name: hashlib.sha256("".join(sorted(rows)).encode()).hexdigest() for name, rows in everything.items()}


def recorded_rows(recipe: Recipe) -> dict[str, set[str]]:
    """The row hashes (`splits.question_hashes`) by split that the artifacts, the checkpoints, the routers, the second
    pass and the calibration of the recipe say they were made with. Raises ArtifactError, ProvenanceError or RecipeError
    where a record cannot be read."""
    rows: dict[str, set[str]] = {}
    for folder in trained_folders(recipe).values():
        provenance = read_provenance(folder)
        for name, hashes in provenance.rows.items() if provenance else ():
            rows.setdefault(name, set()).update(hashes)
    if recipe.trigger.calibration:
        content = calibration(location(recipe.trigger.calibration))
        rows.setdefault(f"calibration ({content.task})", set()).update(content.rows)
    return rows


def _collected(recipe: Recipe, data: Path | None) -> set[str]:
    try:
        chosen, items = load(recipe.collect.task, data, recipe.prompts)
    except TaskError as error:
        raise QuestionError(
            f"collect.task: the training rows are needed to see that no test row is among them: {error}"
        ) from None
    return set(fingerprint(chosen.sample(items, recipe.collect.prompts, recipe.seed)))


@dataclass(frozen=True)
class Row:
    """One question of the job: which item is asked of which policy, with which seed, for which time. `settings` is what
    the endpoint says of the policy."""

    task: Task
    item: Item
    policy: str
    seed: int
    repeat: int
    settings: Mapping[str, Any]

    @property
    def request_seed(self) -> int:
        """Noise depends on (seed, step) alone, so every item gets a seed of its own: answers to different
        items stay independent, and policies that are compared share their noise."""
        text = f"{self.seed}/{self.repeat}/{self.item.uid}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    @property
    def turns(self) -> list[str]:
        """What the user says after the first answer."""
        return list(self.item.metadata["turns"])[1:] if self.task.turns > 1 else []

    @property
    def key(self) -> str:
        """Everything the answer depends on: policy, its settings and weights, seed, repeat, prompt and
        limit."""
        parts = {
            "policy": self.policy,
            "settings": self.settings,
            "seed": self.seed,
            "repeat": self.repeat,
            "item": self.item.uid,
            "prompt": self.item.prompt,
            "turns": self.turns,
            "options": self.item.options,
            "max_tokens": self.task.max_new_tokens,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def question(self) -> Question:
        return {
            "key": self.key,
            "model": self.policy,
            "seed": self.request_seed,
            "max_tokens": self.task.max_new_tokens,
            "messages": json.dumps(self.item.prompt),
            "turns": json.dumps(self.turns),
            "options": json.dumps(self.item.options),
        }

    @property
    def prompt_tokens(self) -> int:
        """About how many tokens the first turn has."""
        return sum(len(message["content"]) for message in self.item.prompt) // CHARACTERS


def plan(
    recipe: Recipe,
    chosen: Sequence[tuple[Task, list[Item]]],
    settings: Mapping[str, Mapping[str, Any]],
    repeats: int,
) -> list[Row]:
    """Every row of the job in its order: a policy's rows follow each other, so that its latency is its own. A
    policy that votes is left out of tasks without votes. Raises QuestionError where a seed or policy is named
    twice."""
    for what, values in (("policies", recipe.benchmark.policies), ("seeds", recipe.benchmark.seeds)):
        twice = next((value for value in values if values.count(value) > 1), None)  # type: ignore[attr-defined]
        if twice is not None:
            raise QuestionError(f"benchmark.{what}: {twice} is named twice")
    return [
        Row(task, item, policy, seed, repeat, settings[policy])
        for task, items in chosen
        for policy in recipe.benchmark.policies
        if task.votes or not settings[policy].get("votes")
        for seed in recipe.benchmark.seeds
        for repeat in range(repeats)
        for item in items
    ]


def tight_limits(rows: Sequence[Row]) -> list[str]:
    """A line for each task whose limit does not fit beside a typical prompt (the median) in the context that the
    endpoint names for a policy: such answers get less than their limit."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        if isinstance(row.settings.get("context"), int):
            tasks.setdefault(row.task.name, []).append(row)
    lines = []
    for name, own in tasks.items():
        tightest = min(own, key=lambda row: row.settings["context"])
        context, limit = tightest.settings["context"], tightest.task.max_new_tokens
        prompt = int(median(row.prompt_tokens for row in own))
        if prompt + limit > context:
            change = f"set slm.context and teacher.context to {prompt + limit} or more"
            if prompt < context:
                change += f", or benchmark.max_new_tokens to {context - prompt} or less"
            lines.append(
                f"{name}: an answer's limit of {limit} tokens and a prompt of about {prompt} exceed the context of "
                f"{tightest.policy}, {context}, so answers may get less; {change}"
            )
    return lines
