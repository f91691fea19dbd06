"""Chats and texts as token ids: the one way in for prompts of collections, requests and audits.

A chat template is a program that came with the model, and templates differ in what they take and what they add:
- One that refuses a system message, or leaves it out, gets its text at the head of the first user turn.
- One that writes today's date is given a fixed one: the same chat gives the same ids on every day.
- One that begins with the begin-of-text token has it once: ids are made without adding special tokens.

Text with lone surrogates (half a character, as a cut JSON escape leaves) is refused, not repaired: a prompt is answered
as it was sent or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What templates take for now. Llama 3.2's own where it knows no other.
TODAY = datetime(2024, 7, 26)

Message = dict[str, str]


class ChatError(ValueError):
    """Messages or text that cannot be made a prompt of; the message says why, in one line."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The ids of a chat up to where the assistant's answer begins. Raises ChatError."""
    return encode(tokenizer, render(tokenizer, messages))


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of a chat up to where the assistant's answer begins. Raises ChatError where the template refuses it."""
    for message in messages:
        _check_text(message["content"])
    if any(message["role"] == "system" for message in messages) and not _takes_system(tokenizer):
        messages = _without_system(messages)
    return _apply(tokenizer, messages)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """The ids of a text. With `special`, those of a prompt of its own: begun as the tokenizer begins texts (with a
    begin-of-text token, where it has one), once. Raises ChatError."""
    _check_text(text)
    begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    return tokenizer.encode(text, add_special_tokens=special and not begun)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def follow_up(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What comes behind an answer under way where the user asks `question` next, as text: the end of the answer's turn,
    the user's turn, and the beginning of the next answer. Raises ChatError where the template refuses that, or leaves
    earlier answers out."""
    answer = "An answer under way."
    turns = [("user", "Hello"), ("assistant", answer), ("user", question)]
    _, shown, behind = render(tokenizer, [{"role": role, "content": text} for role, text in turns]).partition(answer)
    if not shown:
        raise ChatError("the chat template leaves earlier answers out")
    return behind


@lru_cache(maxsize=8)
def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has a place for a system message, found out by trying."""
    system = "a system message"
    try:
        return system in _apply(
            tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        )
    except ChatError:
        return False


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system messages' texts before the first user turn's, a blank line between them."""
    texts = [message["content"] for message in messages if message["role"] == "system"]
    others = [dict(message) for message in messages if message["role"] != "system"]
    first = next((message for message in others if message["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(texts)}, *others]
    first["content"] = "\n\n".join([*texts, first["content"]])
    return others


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    if not tokenizer.chat_template:
        raise ChatError("no chat template: the model's tokenizer holds none")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **_fixed_date()
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        KeyError,
    ) as error:  # the template is a program, with faults of its own
        raise ChatError(f"the chat template refuses the messages: {' '.join(str(error).split())}") from None
    return str(text)


def _fixed_date() -> dict[str, Any]:
    """What templates ask for the date: a variable of Llama's, and a function that transformers gives all of them, which
    a variable of that name replaces."""
    return {"date_string": TODAY.strftime("%d %b %Y"), "strftime_now": TODAY.strftime}


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = ascii(text[error.start])
        raise ChatError(f"not text: a lone surrogate, {lone}, at character {error.start}") from None
