"""MT-Bench: a judge model rates each turn from 1 to 10 (single-answer grading with the published prompts, which are
data).

The judge is anything that answers chat messages: the teacher, or an OpenAI-compatible endpoint. A rating counts only as
`[[n]]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from s2t_models.errors import one_line
from serving import http

Ask = Callable[[list[dict[str, str]]], str]


class JudgeError(Exception):
    """A judge that gave no answer; the message is one line."""


#: What a judge may write about one turn.
MAX_TOKENS = 2048

_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")


@dataclass(frozen=True)
class Conversation:
    """One MT-Bench question: its turns, and the reference answers where it has them (maths, reasoning, coding)."""

    turns: tuple[str, ...]
    references: tuple[str, ...] = ()


def rating(text: str) -> float | None:
    """The judge's rating, or None where there is no `[[n]]` from 1 to 10, or several that differ."""
    found = {float(value) for value in _RATING.findall(text)}
    return found.pop() if len(found) == 1 and 1 <= next(iter(found)) <= 10 else None


def messages(
    conversation: Conversation, answers: Sequence[str], turn: int, prompts: dict[str, dict[str, str]]
) -> list[dict[str, str]]:
    """What the judge is asked about the answer to turn 0 or 1.

    Args:
        prompts: the published judge prompts by name, with `system_prompt` and `prompt_template`.
    """
    name = f"single-{'math-v1' if conversation.references else 'v1'}{'-multi-turn' if turn else ''}"
    fields: dict[str, str] = {"question": conversation.turns[0], "answer": answers[0]}
    for index, text in enumerate(conversation.turns, start=1):
        fields[f"question_{index}"] = text
    for index, text in enumerate(answers, start=1):
        fields[f"answer_{index}"] = text
    for index, text in enumerate(conversation.references, start=1):
        fields[f"ref_answer_{index}"] = text
    prompt = prompts[name]
    return [
        {"role": "system", "content": prompt["system_prompt"].strip()},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]


def rate(
    conversation: Conversation, answers: Sequence[str], prompts: dict[str, dict[str, str]], ask: Ask
) -> list[float | None]:
    """One rating a turn; None where the judge gave none that counts.

    Raises:
        ValueError: not one answer a turn.
    """
    if len(answers) != len(conversation.turns):
        raise ValueError(f"the question has {len(conversation.turns)} turns, but there are {len(answers)} answers")
    return [rating(ask(messages(conversation, answers, turn, prompts))) for turn in range(len(answers))]


def endpoint(url: str, model: str, api_key: str = "", seconds: float = 600.0) -> Ask:
    """A judge behind an OpenAI-compatible endpoint, `url` being its base such as http://127.0.0.1:8000 or .../v1.

    What it returns raises JudgeError where the endpoint cannot be asked, refuses, or gives no text."""
    address = f"{http.base_url(url)}/chat/completions"
    headers = http.authorization(api_key)

    def ask(chat: list[dict[str, str]]) -> str:
        body: dict[str, object] = {"model": model, "messages": chat, "temperature": 0.0}
        # Where prompt and limit exceed the judge's context, again with whatever room the context leaves.
        for attempt in (body | {"max_tokens": MAX_TOKENS}, body):
            try:
                with http.client(url, timeout=seconds, headers=headers) as client:
                    response = client.post(
                        address, content=json.dumps(attempt), headers={"Content-Type": "application/json"}
                    )
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                raise JudgeError(f"the judge could not be asked: {one_line(error)}") from None
            if response.is_success:
                return _text(response)
            if "context_length_exceeded" not in response.text:
                break
        raise JudgeError(f"the judge refused: {response.status_code}: {one_line(response.text)}")

    return ask


def _text(response: httpx.Response) -> str:
    """The first choice's text. Raises JudgeError where there is none."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise JudgeError(f"the judge's reply is not a chat completion with a text: {one_line(response.text)}")
    return content
