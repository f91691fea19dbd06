"""The letter that a response to a multiple-choice question settles on.

Statements are ranked by how plainly they answer. The last of the plain ones counts: a box that holds a letter, "the
answer is (C)", JSON, <answer> tags. Then come a list that calls one option right and others wrong, a line that is a
letter, "C is correct", the text of one option, and last the final letter that stands alone, as MMLU-Pro's own
extraction has it. The article "a", the pronoun "I" and letters called wrong are not answers. It does not know which
letter is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from s2t_models.answers.final_answer import conclusion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MARKUP = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathbf|boxed|fbox)\s?\{([^{}]*)\}|\*+|__|`|\\[()\[\]]|\$|</?[a-z]+>", re.IGNORECASE
)
_LEVELS = 4  # of nested markup that are taken off
_BOX = re.compile(r"\\(?:boxed|fbox)\s?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_JSON = re.compile(
    r"[\"'](?:final[_ ]?|correct[_ ]?)?(?:answer|choice|option)[\"']\s?:\s?(?:\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)')",
    re.IGNORECASE,
)
_FILLER = (
    r"(?:(?:therefore|thus|hence|then|indeed|clearly|definitely|simply|most likely|likely|most probably|probably|"
    r"option|choice|letter|answer|be|the)\s|:\s{0,2}|-\s){0,6}"
)
_LETTER = r"(?:['‘]([A-Za-z])['’]|[(\[\"“{]?([A-Za-z])(?![A-Za-z0-9'’+])[)\]\"”}]?)"
_STATED = re.compile(
    r"\b(?:answer|choice|option|ans)(?:\s(?:choice|option|letter))?\s?(?:\([^()\n]{0,40}\)\s?)?"
    r"(?:(?:to|for|of)\s[^.\n:=]{1,60}?\s?)?"
    r"(?:\b(?:is|was|(?:would|should|must|will|has\sto)\sbe)|:|\.(?=\s?[A-Z]\b)|=|→|->|-(?=\s))\s{0,2}"
    + _FILLER
    + _LETTER,
    re.IGNORECASE,
)
_STATED_TEXT = re.compile(
    r"\b(?:answer|choice|option)\s?(?:is|was|:|would\sbe|should\sbe|must\sbe)\s{0,2}([^\n]{1,400})", re.IGNORECASE
)
_CHOSEN = re.compile(
    r"(?:\b(?:choose|chose|selected|select|picked|pick|go(?:ing)?\swith|settle\son|correct\s(?:option|choice))\s"
    r"(?:(?:option|choice|answer|is|letter)\s)?(?-i:" + _LETTER + r"))"
    r"|(?:\(?\b(?-i:([A-Z]))\)?\s(?:is|seems|appears|must\sbe|would\sbe)\s(?:to\sbe\s)?(?:the\s|our\s|my\s)?(?:only\s)?"
    r"(?:correct|right|best|most\s(?:likely|appropriate|accurate)|answer|true\sanswer)\b)",
    re.IGNORECASE,
)
_NEGATED = re.compile(
    r"\b(?:(?:not|cannot|can't)(?:\sbe)?|never|eliminate|exclude|rule\sout|reject|than|nor)\s(?:(?:option|choice"
    r"|necessarily|the)\s){0,2}[(\[]?$",
    re.IGNORECASE,
)
_SUPPOSED = re.compile(
    r"\b(?:if|whether|suppose|assuming|imagine|thought)\s(?:that\s)?(?:the\s)?(?:correct\s)?$", re.IGNORECASE
)
_ANOTHER = re.compile(
    r",\s?[(\[][A-Z][)\]](?=[.,;]?(?:\s?$|\s(?:and|or)\b))|,\s?[A-Z](?=\.?\s?(?:$|\n))"
    r"|\s(?:and|or|&)\s(?:option\s)?[(\[]?[A-Z](?![A-Za-z'’])[)\]]?(?!\s(?:is|was|fails|would|does|has|can)\b)"
)
_PAIRED = re.compile(r"(?<![A-Za-z])[(\[]?[A-Z][)\]]?\s(?:and|or|&)\s$")
_LINE = re.compile(r"\s?(?:option|choice)?\s?[(\[]?([A-Za-z])[)\].:]*\s?", re.IGNORECASE)
_LEADING = re.compile(r"\s?[(\[]?([A-Z])[)\].:]+(?:\s|$)")
_ALONE = re.compile(r"(?<![A-Za-z0-9'’\\])[(\[]?([A-Z])(?![A-Za-z0-9'’+])[)\]]?")
_CONNECTOR = r"(?:because|since|as|and|but|which|with|for|or|is|due|so|then|that)\b"
_MORE_WORDS = re.compile(rf"\s(?!{_CONNECTOR})\w")
_PROSE = re.compile(rf"\s(?!{_CONNECTOR})[a-z]")
_DISMISSED = re.compile(
    r"\s?(?:\([^()\n]{0,40}\)\s?)?(?:(?:is|are|was|seems|would\sbe|can(?:'t|not)\sbe)\s(?:also\s)?(?:not|in|wrong"
    r"|false|un)"
    r"|(?:can'?not|can't|isn't|fails)\b)"
)
#: "B: Correct." in a list with a verdict on each option.
_OPTION_LINE = re.compile(r"\W{0,4}(?:(?:[Oo]ption|[Cc]hoice)\s)?[(\[]?([A-Z])\b(.*)")
_VERDICT_BREAK = re.compile(r"\n|(?<=[.;])\s(?=\([A-Z]\)\s)")
_RIGHT = re.compile(r"(?<!not )\b(?:correct|true|right)\W*$|[✅✓✔]", re.IGNORECASE)
_WRONG = re.compile(r"\b(?:incorrect|wrong|false|not (?:correct|true|right))\W*$|[❌✗✘]", re.IGNORECASE)
_CONTRAST = re.compile(r",?\s(?:not|rather\sthan|instead\sof|unlike|because|since|whereas|while)\s.*")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_HELD = re.compile(
    r"(?:(?:option|choice|answer)\s?:?\s?)?[(\[{]?(?:([A-Za-z])[)\]}]?[.:]?|([A-Z])(?:[)\].:,]+|\s[-–(]).*)",
    re.IGNORECASE,
)


def choice(response: str, letters: str, options: Sequence[str] = ()) -> str | None:
    """The chosen letter, or None.

    Args:
        letters: the letters on offer, such as "ABCD".
        options: their texts in the same order, for responses that name the text instead of the letter.
    """
    text = _unmarked(_as_statements(conclusion(response).translate(_FULL_WIDTH), letters, options))
    if not text:
        return None
    for found in (
        _find(_STATED, text, letters),
        _judged(text, letters),
        _own_line(text, letters),
        _find(_CHOSEN, text, letters),
    ):
        if found:
            return found if found in letters else None
    stated = [match[1].split(". ")[0] for match in _STATED_TEXT.finditer(text)][-1:]
    last = text.splitlines()[-1]
    for clause in (*stated, last.rstrip(".").split(". ")[-1], last):
        before = _CONTRAST.sub("", clause)
        if by_text := _by_text(clause, letters, options) or _by_text(before, letters, options):
            return by_text
    return _last_alone(text, letters)


def _unmarked(text: str) -> str:
    for _ in range(_LEVELS):
        text, changes = _MARKUP.subn(lambda match: match[1] or "", text)
        if not changes:
            break
    return re.sub(r"\s+", lambda run: "\n" if "\n" in run[0] else " ", text).strip()


def _as_statements(text: str, letters: str, options: Sequence[str]) -> str:
    """The text with every box, <answer> tag and JSON field that holds a letter, or an option's text, as "the answer is
    (C)."."""

    def statement(match: re.Match[str]) -> str:
        inside = _unmarked(next((group for group in match.groups() if group is not None), ""))
        held = _HELD.fullmatch(inside)
        letter = _exactly(inside, letters, options) or ((held[1] or held[2]).upper() if held else "")
        letter = letter if letter and letter in letters else _by_text(inside, letters, options) or ""
        return f" The answer is ({letter}).\n" if letter else match[0]

    for pattern in (_BOX, _TAG, _JSON):
        text = pattern.sub(statement, text)
    return text


def _find(pattern: re.Pattern[str], text: str, letters: str) -> str | None:
    """The last match of the pattern whose letter is on offer, is no word of the language and is not only supposed; two
    letters ("A and B") come back as "?", which is no letter."""
    for match in reversed(list(pattern.finditer(text))):
        group = next(index for index, value in enumerate(match.groups(), start=1) if value)
        letter = match.group(group)
        before = text[max(0, match.start() - 60) : match.start()]
        bracketed = text[match.start(group) - 1] in "([" if match.start(group) else False
        if (
            letter.upper() not in letters
            or _is_word(text, match, group)
            or _SUPPOSED.search(before)
            or _NEGATED.search(before)
        ):
            continue
        if letter.islower() and not bracketed and _MORE_WORDS.match(text, match.end()):
            continue
        return "?" if _ANOTHER.match(text, match.end()) else letter.upper()
    return None


def _is_word(text: str, match: re.Match[str], group: int) -> bool:
    """Whether the letter is the article "a" or the pronoun "I": bare, and followed by prose."""
    letter = match.group(group)
    bracketed = match.start(group) > 0 and text[match.start(group) - 1] in "([\"'“"
    return not bracketed and letter in "AaIi" and _PROSE.match(text, match.end(group)) is not None


def _judged(text: str, letters: str) -> str | None:
    """The one option called right in a list that calls others wrong, a line or sentence each."""
    lines = [(found[1], found[2]) for line in _VERDICT_BREAK.split(text) if (found := _OPTION_LINE.match(line))]
    right = {letter for letter, verdict in lines if letter in letters and _RIGHT.search(verdict)}
    wrong = {letter for letter, verdict in lines if _WRONG.search(verdict)}
    return right.pop() if len(right) == 1 and wrong - right else None


def _own_line(text: str, letters: str) -> str | None:
    """A first or last line that is a letter; or a leading "C. ..." in a response that lists no other option so."""
    lines = text.splitlines()
    for line in (lines[-1], lines[0]):
        alone = _LINE.fullmatch(line)
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


def _exactly(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The one option whose text this is, signs and all."""
    wanted = _unmarked(text).rstrip(".").casefold()
    same = [
        letter
        for letter, option in zip(letters, options, strict=False)
        if _unmarked(option).rstrip(".").casefold() == wanted
    ]
    return same[0] if len(same) == 1 and wanted else None


def _by_text(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The one option whose words stand in the text. None where several do, unless one contains all the others."""
    if exact := _exactly(text, letters, options):
        return exact
    words = f" {_plain(text)} "
    named = [(letter, _plain(option)) for letter, option in zip(letters, options, strict=False)]
    named = [(letter, option) for letter, option in named if option and f" {option} " in words]
    if not named:
        return None
    longest = max(named, key=lambda pair: len(pair[1]))
    contains_all = all(letter == longest[0] or f" {option} " in f" {longest[1]} " for letter, option in named)
    same_text = sum(option == longest[1] for _, option in named)
    return longest[0] if contains_all and same_text == 1 else None


def _last_alone(text: str, letters: str) -> str | None:
    for match in reversed(list(_ALONE.finditer(text))):
        before = text[max(0, match.start() - 60) : match.start()]
        dismissed = _DISMISSED.match(text, match.end()) or _NEGATED.search(before)
        dismissed = dismissed or _PAIRED.search(before) or _ANOTHER.match(text, match.end())
        if match[1] in letters and not _is_word(text, match, 1) and not dismissed:
            return match[1]
    return None
