"""Finding the final answer in a worked solution.

The order is that of the Qwen2.5-Math evaluation, which the paper follows: the last \\boxed{}, then GSM8K's `####`, then what
follows "the answer is", then the last number. It does not know whether what it finds is right.
"""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?(?!\d)|-?\d*\.?\d+")
_PHRASE = re.compile(r"(?:final answer|answer) is:?|(?:^|\n)[\s*#]*(?:final )?answer\s*[:：]", re.IGNORECASE)
_BOX = re.compile(r"\\boxed|\\fbox|boxed(?=\{)")
_HASHES = re.compile(r"####\s*([^\n]+)")
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{}; an unclosed one runs to the end of its line. None where there is none."""
    opened = list(_BOX.finditer(text))
    if not opened:
        return None
    rest = text[opened[-1].end() :].lstrip()
    if not rest.startswith("{"):
        content = re.split(r"[$\n]", rest, maxsplit=1)[0].strip()
        return content or None
    depth = 0
    for index, character in enumerate(rest):
        if character == "{" and rest[index - 1 : index] != "\\":
            depth += 1
        elif character == "}" and rest[index - 1 : index] != "\\":
            depth -= 1
            if depth == 0:
                return rest[1:index].strip()
    return rest[1:].split("\n", 1)[0].strip() or None


def _clause(text: str) -> str:
    """The formula or the first sentence that a phrase such as "the answer is" introduces."""
    text = text.strip().removeprefix(":").strip().lstrip("*_ ")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and closing in text[len(opening) :]:
            return text[len(opening) :].split(closing, 1)[0].strip()
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    return sentence.strip().strip("*_").strip()


def last_number(text: str) -> str | None:
    """The last number, its thousands separators taken out. None where there is none."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def final_answer(response: str) -> str | None:
    """The final answer of a worked solution as it is written, or None where there is nothing that could be one."""
    in_box = boxed(response)
    if in_box is not None:
        return in_box or None
    hashes = _HASHES.findall(response)
    if hashes:
        return _clause(hashes[-1]) or None
    phrases = list(_PHRASE.finditer(response))
    if phrases:
        clause = _clause(response[phrases[-1].end() :])
        # A clause of prose ("18 dollars, because ...") is answered by its first number.
        if len(clause.split()) > 4 and "\\" not in clause:
            numbers = NUMBER.findall(clause)
            clause = numbers[0].replace(",", "") if numbers else clause
        if clause:
            return clause
    return last_number(response)
