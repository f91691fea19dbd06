"""The letter that a response to a multiple-choice question settles on.

Statements are tried from the plainest to the vaguest: a boxed letter, "the answer is (C)", a line that is a letter, "C is correct", the text
of one option, and last the final letter that stands alone, as MMLU-Pro's own extraction does. The article "a", the pronoun "I" and letters
called wrong are not answers. It does not know which letter is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipelines.grading.final_answer import boxed

_NEXT_QUESTION = re.compile(r"\n\s*(?:#+\s*)?(?:Question|Problem)\s*\d*\s*:", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:text|mathrm|mathbf|textbf|boxed|fbox)\s*\{([^{}]*)\}|\*\*|__|`|\\[()\[\]]|\$")
_FILLER = r"(?:(?:therefore|thus|hence|then|indeed|clearly|definitely|likely|most likely|probably|option|choice|letter|answer|be|the)\s+|:\s*)*"
_LETTER = r"[(\[\"'“]?([A-Za-z])(?![A-Za-z0-9'’])[)\]\"'”]?"
_STATED = re.compile(
    r"(?:answer|choice|option)(?:\s+(?:choice|option|letter))?\s*(?:\([^)]*\)\s*)?(?:is|was|:|would\s+be|should\s+be|must\s+be|=)\s*"
    + _FILLER
    + _LETTER,
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?:\b(?:choose|chose|select|pick|go\s+with|correct\s+(?:option|choice))\s+(?:option|choice|answer|is)?\s*"
    + _LETTER
    + r")"
    r"|(?:\(?\b([A-Z])\)?\s+(?:is|seems|appears)\s+(?:to\s+be\s+)?(?:the\s+)?(?:only\s+)?"
    r"(?:correct|right|best|most\s+(?:likely|appropriate|accurate)|answer|true\s+answer)\b)"
)
_LINE = re.compile(r"^\s*[(\[]?([A-Za-z])[)\].:]*\s*$")
_LEADING = re.compile(r"^\s*[(\[]?([A-Z])[)\].:]+(?:\s|$)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’])[(\[]?([A-Z])(?![A-Za-z0-9'’])[)\]]?")
_MORE_WORDS = re.compile(r"[ \t]+\w")
_PROSE = re.compile(r"\s+(?!(?:because|since|as|and|but|which|with|for|or|is|due|so|then|that)\b)[a-z]")
_DISMISSED = re.compile(
    r"\s*(?:\([^)]*\)\s*)?(?:is|are|was|seems|would\s+be|can(?:'t|not)\s+be)\s+(?:also\s+)?(?:not|in|wrong|false|un)|\s+(?:can'?not|can't|isn't)\b"
)


def _is_word(text: str, match: re.Match[str], group: int) -> bool:
    """Whether the letter is the article "a" or the pronoun "I": bare, and followed by prose."""
    letter = match.group(group)
    bracketed = match.start(group) > 0 and text[match.start(group) - 1] in "([\"'“"
    return not bracketed and letter in "AaIi" and _PROSE.match(text, match.end(group)) is not None


def _find(pattern: re.Pattern[str], text: str, letters: str) -> str | None:
    """The last match of the pattern whose letter is on offer and is no word of the language."""
    for match in reversed(list(pattern.finditer(text))):
        group = next(index for index, value in enumerate(match.groups(), start=1) if value)
        letter = match.group(group)
        if letter.islower() and _MORE_WORDS.match(text, match.end()) and text[match.start(group) - 1] not in "([":
            continue
        if letter.upper() in letters and not _is_word(text, match, group):
            return letter.upper()
    return None


def _own_line(text: str, letters: str) -> str | None:
    """A first or last line that is a letter; or a leading "C. ..." in a response that lists no other option so."""
    lines = [line for line in text.splitlines() if line.strip()]
    for line in (lines[-1], lines[0]):
        alone = _LINE.match(line)
        if alone and alone[1].upper() in letters:
            return alone[1].upper()
    leading = {found[1] for line in lines if (found := _LEADING.match(line)) and found[1] in letters}
    for line in (lines[-1], lines[0]):
        found = _LEADING.match(line)
        if found and leading == {found[1]}:
            return found[1]
    return None


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()


def _by_text(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The one option whose words stand in the last line. None where several do, unless one contains all the others."""
    last = f" {_plain(text.splitlines()[-1])} "
    named = [
        (letter, _plain(option))
        for letter, option in zip(letters, options, strict=False)
        if f" {_plain(option)} " in last
    ]
    named = [(letter, words) for letter, words in named if words]
    if not named:
        return None
    longest = max(named, key=lambda pair: len(pair[1]))
    contains_all = all(letter == longest[0] or f" {words} " in f" {longest[1]} " for letter, words in named)
    same_text = sum(words == longest[1] for _, words in named)
    return longest[0] if contains_all and same_text == 1 else None


def _last_alone(text: str, letters: str) -> str | None:
    for match in reversed(list(_ALONE.finditer(text))):
        if match[1] in letters and not _is_word(text, match, 1) and not _DISMISSED.match(text, match.end()):
            return match[1]
    return None


def choice(response: str, letters: str, options: Sequence[str] = ()) -> str | None:
    """The chosen letter, or None.

    Args:
        letters: the letters on offer, such as "ABCD".
        options: their texts in the same order, for responses that name the text instead of the letter.
    """
    text = _NEXT_QUESTION.split(response.split("</think>")[-1].strip(), maxsplit=1)[0]
    in_box = boxed(text)
    if in_box is not None:
        text_in_box = _MARKUP.sub(lambda m: m[1] or "", in_box).strip()
        found = re.match(r"[(\[]?([A-Za-z])(?![A-Za-z0-9])", text_in_box)
        if found and found[1].upper() in letters:
            return found[1].upper()
        by_text = _by_text(text_in_box, letters, options) if text_in_box else None
        if by_text:
            return by_text
    while _MARKUP.search(text):
        text = _MARKUP.sub(lambda m: m[1] or "", text)
    if not text.strip():
        return None
    stated = _find(_STATED, text, letters) or _own_line(text, letters) or _find(_CHOSEN, text, letters)
    return stated or _by_text(text.strip(), letters, options) or _last_alone(text, letters)
