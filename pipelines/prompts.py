"""The prompts of a collection: from a task's split or a file, each with the seed and temperature it will be
rolled out at.

They are written to a file before anything runs, because Ray Data resumes only a plan that starts at a file
read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from s2t_models.recipe import Recipe

Messages = list[dict[str, str]]


class PromptError(ValueError):
    """Prompts that cannot be used; the message is one line."""


def from_task(name: str, data: Path | None, recipe: Recipe) -> list[tuple[str, Messages]]:
    """The recipe's number of a task's items, drawn with its seed: (uid, messages).

    Raises PromptError where there is no such task or its files are missing or malformed.
    """
    from pipelines.tasks import task

    try:
        chosen = task(name)
        items = chosen.sample(chosen.load(data), recipe.collect.prompts, recipe.seed)
    except (KeyError, FileNotFoundError, ValueError) as error:
        raise PromptError(f"task {name}: {error.args[0] if error.args else error}") from None
    return [(item.uid, item.prompt) for item in items]


def from_file(path: Path) -> list[tuple[str, Messages]]:
    """Every line of a JSON-lines file with a `uid` and either `prompt`, a user's message, or `messages`, a
    chat.

    Raises PromptError naming the first line that is not like that.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such file of prompts")
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_read(json.loads(line)))
        except (json.JSONDecodeError, TypeError, KeyError, AttributeError):
            raise PromptError(
                f'{path}:{number}: expected {{"uid": ..., "prompt": "..."}} or {{"uid": ..., "messages": '
                '[{"role": "user", "content": "..."}]}'
            ) from None
    if not prompts:
        raise PromptError(f"{path}: holds no prompts")
    return prompts


def rows(prompts: list[tuple[str, Messages]], recipe: Recipe) -> list[dict[str, Any]]:
    """One row a prompt, greedy and sampled ones spread evenly in the recipe's share (D.2).

    Raises PromptError where a uid occurs twice: rows are told apart by it.
    """
    seen: set[str] = set()
    made = []
    share = recipe.collect.sampled
    for index, (uid, messages) in enumerate(prompts):
        if uid in seen:
            raise PromptError(f"prompts: the uid {uid!r} occurs twice; every prompt needs its own")
        seen.add(uid)
        sampled = int((index + 1) * share) > int(index * share)
        made.append(
            {
                "uid": uid,
                "messages": json.dumps(messages),
                "seed": _seed(recipe.seed, uid),
                "temperature": recipe.collect.temperature if sampled else 0.0,
            }
        )
    return made


def _read(line: dict[str, Any]) -> tuple[str, Messages]:
    chat = line["messages"] if "messages" in line else [{"role": "user", "content": line["prompt"]}]
    messages = [{"role": str(message["role"]), "content": message["content"]} for message in chat]
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError("a message's content is text")
    return str(line["uid"]), messages


def _seed(seed: int, uid: str) -> int:
    digest = hashlib.sha256(f"{seed}\x00{uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
