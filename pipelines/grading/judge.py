"""MT-Bench: a judge model rates each turn from 1 to 10 (single-answer grading with the published prompts, which are data).

The judge is anything that answers chat messages: the teacher, or an OpenAI-compatible endpoint. A rating counts only as `[[n]]`.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Ask = Callable[[list[dict[str, str]]], str]


class JudgeError(Exception):
    """A judge that gave no answer; the message is one line."""


#: What a judge may write about one turn.
MAX_TOKENS = 2048

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class Question:
    """One MT-Bench question: its turns, and the reference answers where it has them (maths, reasoning, coding)."""

    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def rating(text: str) -> float | None:
    """The judge's rating, or None where there is no `[[n]]` from 1 to 10, or several that differ."""
    found = {float(value) for value in _RATING.findall(text)}
    return found.pop() if len(found) == 1 and 1 <= next(iter(found)) <= 10 else None


def messages(
    question: Question, answers: Sequence[str], turn: int, prompts: dict[str, dict[str, str]]
) -> list[dict[str, str]]:
    """What the judge is asked about the answer to turn 0 or 1.

    Args:
        prompts: the published judge prompts by name, with `system_prompt` and `prompt_template`.
    """
    name = f"single-{'math-v1' if question.references else 'v1'}{'-multi-turn' if turn else ''}"
    fields: dict[str, str] = {"question": question.turns[0], "answer": answers[0]}
    for index, text in enumerate(question.turns, start=1):
        fields[f"question_{index}"] = text
    for index, text in enumerate(answers, start=1):
        fields[f"answer_{index}"] = text
    for index, text in enumerate(question.references, start=1):
        fields[f"ref_answer_{index}"] = text
    prompt = prompts[name]
    return [
        {"role": "system", "content": prompt["system_prompt"].strip()},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]


def rate(
    question: Question, answers: Sequence[str], prompts: dict[str, dict[str, str]], ask: Ask
) -> list[float | None]:
    """One rating a turn; None where the judge gave none that counts.

    Raises:
        ValueError: not one answer a turn.
    """
    if len(answers) != len(question.turns):
        raise ValueError(f"the question has {len(question.turns)} turns, but there are {len(answers)} answers")
    return [rating(ask(messages(question, answers, turn, prompts))) for turn in range(len(answers))]


def endpoint(url: str, model: str, api_key: str = "", seconds: float = 600.0) -> Ask:
    """A judge behind an OpenAI-compatible endpoint, `url` being its base such as http://127.0.0.1:8000/v1.

    What it returns raises JudgeError with what the endpoint said."""

    def post(body: dict[str, object]) -> str:
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=seconds) as response:
            content = response.read()
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            raise JudgeError(f"the judge's reply is not a chat completion: {_line(content)}") from None

    def ask(chat: list[dict[str, str]]) -> str:
        body: dict[str, object] = {"model": model, "messages": chat, "temperature": 0.0}
        bodies = [body | {"max_tokens": MAX_TOKENS}, body]  # the second with whatever room the context leaves
        while True:
            try:
                return post(bodies.pop(0))
            except urllib.error.HTTPError as error:
                said = error.read()
                if not bodies or b"context_length_exceeded" not in said:
                    raise JudgeError(f"the judge refused: {error.code}: {_line(said)}") from None
            except (OSError, ValueError) as error:
                raise JudgeError(f"the judge could not be asked: {_line(str(error).encode())}") from None

    return ask


def _line(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:300]
