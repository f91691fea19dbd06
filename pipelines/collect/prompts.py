"""The prompts of a collection: from a task's split or a file, each with the seed and temperature it will be
rolled out at.

They are written to a file before anything runs, because Ray Data resumes only a plan that starts at a file
read.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tasks import load
from pipelines.tasks.splits import question_hashes
from s2t_models.errors import UserError
from s2t_models.recipe import Recipe
from s2t_models.storage import Location

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A chat to roll out; `question` is the bare question in it, where there is one."""

    uid: str
    messages: Messages
    question: str | None = None


class PromptError(UserError):
    """Prompts that cannot be used; the message is one line."""


def from_task(name: str, data: Path | None, recipe: Recipe) -> list[Prompt]:
    """The recipe's number of a task's items, drawn with its seed; all of them, with a line that says so, where the task
    has fewer.

    Raises TaskError where there is no such task or its files are missing or malformed.
    """
    chosen, items = load(name, data, recipe.prompts)
    wanted = recipe.collect.prompts
    if wanted > len(items):
        print(f"collect: {name} has {len(items):,} prompts of the {wanted:,} asked for; all are taken", file=sys.stderr)
    items = chosen.sample(items, wanted, recipe.seed)
    return [Prompt(item.uid, item.prompt, item.question) for item in items]


def from_file(path: Location) -> list[Prompt]:
    """Every line of a JSON-lines file with a `uid` and either `prompt`, a user's message, or `messages`, a
    chat.

    Raises PromptError naming the first line that is not like that.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such file of prompts")
    try:
        lines = (
            path.read_bytes().decode("utf-8-sig").split("\n")
        )  # a line break of another kind may stand inside a text
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: is not UTF-8 text: {error}") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_read(json.loads(line)))
        except UnicodeEncodeError:
            raise PromptError(
                f"{path}:{number}: holds half a character, a lone surrogate such as \\ud83d, which no model can read"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise PromptError(
                f'{path}:{number}: expected {{"uid": ..., "prompt": "..."}} or {{"uid": ..., "messages": '
                '[{"role": "user", "content": "..."}]}'
            ) from None
    if not prompts:
        raise PromptError(f"{path}: holds no prompts")
    return prompts


def rows(prompts: list[Prompt], recipe: Recipe) -> list[dict[str, Any]]:
    """One row a prompt, greedy and sampled ones spread evenly in the recipe's share (D.2).

    Raises PromptError where a uid occurs twice: rows are told apart by it.
    """
    seen: set[str] = set()
    made = []
    share = recipe.collect.sampled
    for index, prompt in enumerate(prompts):
        uid = prompt.uid
        if uid in seen:
            raise PromptError(f"prompts: the uid {uid!r} occurs twice; every prompt needs its own")
        seen.add(uid)
        sampled = int((index + 1) * share) > int(index * share)
        made.append(
            {
                "index": index,
                "uid": uid,
                "messages": json.dumps(prompt.messages),
                "questions": question_hashes(prompt.messages, prompt.question),
                "seed": _seed(recipe.seed, uid),
                "temperature": recipe.collect.temperature if sampled else 0.0,
            }
        )
    return made


def _read(line: dict[str, Any]) -> Prompt:
    chat = line["messages"] if "messages" in line else [{"role": "user", "content": line["prompt"]}]
    messages = [{"role": str(message["role"]), "content": message["content"]} for message in chat]
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError("a message's content is text")
    prompt = Prompt(str(line["uid"]), messages)
    json.dumps([prompt.uid, messages], ensure_ascii=False).encode()  # raises UnicodeEncodeError for a lone surrogate
    return prompt


def _seed(seed: int, uid: str) -> int:
    digest = hashlib.sha256(f"{seed}\x00{uid}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
