"""Chats as prompts, with templates that refuse, drop or add things."""

from __future__ import annotations

import copy
from datetime import datetime
from typing import Any

import pytest

from s2t_models import chat, loading
from s2t_models.settings import ModelSettings

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + TURNS
)
SYSTEM, USER, ANSWER = (
    {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "2 + 3?"), ("assistant", "5"))
)


@pytest.fixture
def tokenizer() -> Any:
    return copy.copy(loading.load_tokenizer(ModelSettings(path="embedded:slm")))


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_system_message_without_a_place_goes_to_the_first_user_turn(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    merged = "<user>Be brief.\n\n2 + 3?</><assistant>5</><user>2 + 3?</><assistant>"
    assert chat.render(tokenizer, [SYSTEM, USER, ANSWER, USER]) == merged
    assert chat.render(tokenizer, [SYSTEM]) == "<user>Be brief.</><assistant>"
    assert chat.render(tokenizer, [USER]) == "<user>2 + 3?</><assistant>"
    assert USER == {"role": "user", "content": "2 + 3?"}


def test_a_template_that_takes_a_system_message_gets_it(tokenizer: Any) -> None:
    tokenizer.chat_template = TURNS
    assert chat.render(tokenizer, [SYSTEM, USER]) == "<system>Be brief.</><user>2 + 3?</><assistant>"


def test_other_refusals_keep_their_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = ALTERNATES
    with pytest.raises(chat.ChatError, match=r"^the chat template refuses the messages: Roles must alternate$"):
        chat.render(tokenizer, [USER, USER])
    assert chat.render(tokenizer, [SYSTEM, USER]) == "<user>Be brief.\n\n2 + 3?</><assistant>"
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(chat.ChatError, match="refuses the messages: can only concatenate"):
        chat.render(tokenizer, [USER])
    tokenizer.chat_template = None
    with pytest.raises(chat.ChatError, match="no chat template"):
        chat.render(tokenizer, [USER])


@pytest.mark.parametrize("asked", ["date_string", "strftime_now('%d %b %Y')"])
def test_todays_date_is_the_same_on_every_day(tokenizer: Any, asked: str) -> None:
    tokenizer.chat_template = "{{ " + asked + " }}"
    assert chat.render(tokenizer, [USER]) == "26 Jul 2024" == chat.TODAY.strftime("%d %b %Y")
    assert datetime.now() > chat.TODAY


def test_the_begin_of_text_token_comes_once(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    begin = "<|im_start|>"
    start = tokenizer.convert_tokens_to_ids(begin)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = begin
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{begin} $A", None, [(begin, start)])
    tokenizer.chat_template = "{{ bos_token }}" + TURNS
    assert tokenizer.encode("2 + 3?")[0] == start
    assert chat.prompt_ids(tokenizer, [USER]).count(start) == 1
    for text in ("2 + 3?", f"{begin}2 + 3?"):
        assert chat.encode(tokenizer, text, special=True) == [start, *chat.encode(tokenizer, "2 + 3?")]


def test_half_a_character_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(chat.ChatError, match=r"^not text: a lone surrogate, '\\ud83d', at character 3$"):
        chat.render(tokenizer, [USER, {"role": "user", "content": "hi \ud83d"}])
    with pytest.raises(chat.ChatError, match="lone surrogate"):
        chat.encode(tokenizer, "\ude00")
    assert chat.encode(tokenizer, "\U0001f600")


def test_the_embedded_template_is_applied_as_it_is(tokenizer: Any) -> None:
    messages = [SYSTEM, USER]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat.prompt_ids(tokenizer, messages) == expected
