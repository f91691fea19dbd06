"""Finding the final answer in a worked solution.

The order is that of the Qwen2.5-Math evaluation, which the paper follows: the last \\boxed{}, then GSM8K's `####`, then
what follows "the answer is", then the last formula or number. Answers stated as JSON or in <answer> tags rank with
`####`. It does not know whether what it finds is right. Everything here is linear in the text's length: models write
long runs of anything.
"""

from __future__ import annotations

import json
import re

_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?(?!\d)|-?\d*\.?\d+")
#: A number, or the fraction, ratio or time of day that it is part of.
_VALUE = re.compile(rf"(?<![\d/])-?\d+/\d+(?![\d/])|(?<![\d:])\d+:\d+(?![\d:])|{_NUMBER.pattern}")
_BOX = re.compile(r"\\boxed|\\fbox|boxed(?=\{)")
_MOST_BOXES = 20  # of one list
#: What may stand between two boxes that are members of one list: $x=\boxed{3}$ or $x=\boxed{-2}$.
_BETWEEN_BOXES = re.compile(
    r"[\s$]{0,4}(?:\\[)\]])?[\s$]{0,4}(?:,?\s?\\text\s?\{\s?(?:and|or)\s?\}|,?\s?\b(?:and|or)\b|[,;]|\\quad)[\s$]{0,4}"
    r"(?:\\[(\[])?[\s$]{0,4}(?:[a-zA-Z](?:_\{?\w\}?)?\s?=\s?)?"
)
_NEXT_QUESTION = re.compile(
    r"\n\s?(?:[#*]+\s?)?(?:(?:next )?question|problem|exercise|q|human|user)\s?\d*\s?[:：]", re.IGNORECASE
)
#: What ends a chat template's turn, where a server hands it out as text.
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|eos|end|return|endoftext|end_of_text|start_header_id)\|>|<end_of_turn>|<eos>"
    r"|<｜end▁of▁sentence｜>|</s>(?=\s*\Z)"
)
_TAG = re.compile(r"<answer>([^<]*(?:<(?!/?answer>)[^<]*)*)</answer>", re.IGNORECASE)
_JSON = re.compile(
    r"[\"'](?:final[_ ]?|correct[_ ]?)?(?:answer|choice|option)[\"']\s?:\s?"
    r"(\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'|-?[\w.]+)",
    re.IGNORECASE,
)
#: GSM8K's mark; other lines of four hashes are headings ("#### Step 2: ...", "#### 1. First").
_HASHES = re.compile(
    r"####\s?(?:(?:final )?answer\s?:?\s?)?(?!\d+[.)]\s[a-zA-Z])([-+*$\\({\[.\d€£][^\n#]*)", re.IGNORECASE
)
_PHRASE = re.compile(
    r"\banswers?(?:\s(?:to|for|of)\s[^.\n:=]{1,80}?)?[\s*_]{0,4}"
    r"\b(?:is|was|(?:are|were)(?=\s?[:$\\\d(*-])|equals|(?:will|would|should|must)\sbe|comes\s(?:out\s)?to)\b\s?[:：]?"
    r"|\b(?:final|correct)\sanswer[\s*_]{0,4}[:：=]"
    r"|答案[是为]?[:：]?|(?:^|\n)[ *#_>]{0,8}(?:the\s|so,?\sthe\s|my\s)?(?:final\s)?"
    r"(?:answer|ans\.?|result)[ *_]{0,4}(?:[:：=]|\n)",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"[$*]{0,3}\s(?:is|are)\s(?:thus\s|therefore\s|indeed\s)?(?:the|our|my)\s(?:final\s|correct\s)?answer",
    re.IGNORECASE,
)
_LONGEST_VALUE = 60  # characters, before "is the answer"
_CUE = re.compile(rf"{_BOX.pattern}|####|</answer>|{_PHRASE.pattern}", re.IGNORECASE)
_SPACES = re.compile(r"\s+")
_LONGEST_CLAUSE = 8000  # characters
#: In prose an exclamation mark behind a number is no factorial, unless the sentence goes on.
_SENTENCE_END = re.compile(r"\.(?=\s|$)|!!|[!！](?=[\s*_]*$|\s[A-Z])|。|\n")
#: What may stand between a heading and the answer below it: the heading's underline, a list's bullet.
_BELOW_HEADING = re.compile(r"(?:\s?[-=_*]{3,}\s?)?\n\s?(?:[-•]\s)?")
_REASON = re.compile(
    r",?\s\(?(?:because|since|as|which|where|so|given|due|i\.e|(?:(?:and|but)\s)?not|rather\sthan|instead\sof)\b"
    r"|;(?=(?:\s\S+){0,3}\s[a-z]{2,}\s[a-z]{2,})",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"(?:approximately|about|roughly|around|exactly|only|just|simply|therefore|thus|then|indeed|clearly|equal to|"
    r"given by|that|we have)\s",
    re.IGNORECASE,
)
_PROSE = re.compile(r"\b(?!(?:and|or|pi|sqrt|sin|cos|tan|log|ln|pm|am)\b)[A-Za-z]{2,}\b", re.IGNORECASE)
_WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")),
    *(("```", "```"), ("`", "`"), ("***", "***"), ("**", "**"), ("__", "__"), ("*", "*"), ('"', '"'), ("“", "”")),
)
_BOLD = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]*[^\s*])\*\*(?![\w*])")
#: A further formula of the list that an answer is.
_NEXT_FORMULA = re.compile(r"(?:\s?[,;]\s?(?:and\s|or\s)?|\s(?:and|or)\s)(?:\$([^$\n]+)\$|\\\(([^\n]+?)\\\))")
_CURRENCY = re.compile(r"\$\s?-?\d[\d,.]*(?:\s[a-zA-Z]{2,}|\s?[-+*/x×=]\s?\$|\.?$|\.\s)")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{(?:aligned|align|gathered|equation|split|cases)\*?\}")
_ALIGNMENT = re.compile(r"&|\\\\")
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)(?<!\\)\$"
    r"|\\\(([^\\]*(?:\\(?![()])[^\\]*)*)\\\)|\\\[([^\\]*(?:\\(?![\[\]])[^\\]*)*)\\\]"
)

#: What a text ends in: two formulas or more that say what the same letter is.
_SOLUTIONS = re.compile(
    r"\$([a-z])\s?=\s?[^$=\n]{1,60}\$(?:(?:,|,?\s(?:and|or))\s\$\1\s?=\s?[^$=\n]{1,60}\$){1,9}\s?\.?\s?$"
)


def spoken(response: str) -> str:
    """The text behind `</think>` where there is any, up to a token that ends the turn and was decoded as text."""
    _, closed, after = response.rpartition("</think>")
    text = after if closed and after.strip() else response
    before = _END_OF_TURN.split(text, maxsplit=1)[0]
    return before if before.strip() else text


def conclusion(response: str) -> str:
    """What is said for good (`spoken`), up to a next question that the model made up. Runs of spaces become one space
    or line break, so that no pattern meets a long one."""
    text = _SPACES.sub(_one_space, spoken(response)).strip()
    answered = _CUE.search(text)
    asked = _NEXT_QUESTION.search(text, answered.end()) if answered else None
    return text[: asked.start()] if asked else text


def _one_space(run: re.Match[str]) -> str:
    breaks = run[0].count("\n")
    return "\n" * min(breaks, 2) or " "


def _box(text: str, opened: re.Match[str]) -> tuple[str, int | None]:
    """The content of the box that opens there, and where it ends: None for an open one, whose content is the rest of
    its line."""
    start = opened.end() + len(text[opened.end() :]) - len(text[opened.end() :].lstrip())
    if text[start : start + 1] != "{":
        bare = re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip()
        return bare, start + len(bare) if bare else None
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text[start:]):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : start + brace.start()].strip(), start + brace.end()
    return re.split(r"(?<!\\)\$|\n", text[start + 1 :], maxsplit=1)[0].strip(), None


def boxed(text: str) -> str | None:
    """The content of the last \\boxed{} or \\fbox{}; None where there is none, or the last one does not close."""
    opened = list(_BOX.finditer(text))
    if not opened:
        return None
    content, end = _box(text, opened[-1])
    return content if end is not None else None


def _boxed_list(text: str) -> str | None:
    """The last boxed answer: the members of a list where each has a box of its own, an open box up to its line's end.
    None where there is no box."""
    opened = list(_BOX.finditer(text))[-_MOST_BOXES:]
    if not opened:
        return None
    members = [_box(text, opened[-1])[0]]
    for before, after in zip(reversed(opened[:-1]), reversed(opened[1:]), strict=True):
        content, end = _box(text[: after.start()], before)
        if end is None or not _BETWEEN_BOXES.fullmatch(text, end, after.start()):
            break
        members.insert(0, content)
    return ", ".join(dict.fromkeys(members))


def stated_as_data(text: str) -> str | None:
    """The answer of a JSON object ({"answer": "B"}), or between <answer> and </answer>; the last where there are
    several."""
    found = [*_TAG.finditer(text), *_JSON.finditer(text)]
    if not found:
        return None
    value = max(found, key=lambda match: match.start())[1].strip()
    if value[:1] == '"':
        try:
            value = str(json.loads(value))
        except ValueError:
            value = value[1:-1]
    return value.strip("'").strip()


def _clause(text: str) -> str:
    """The formula or the first sentence that a phrase such as "the answer is" introduces."""
    text = text[:_LONGEST_CLAUSE].strip(" ").lstrip(":}")
    if below := _BELOW_HEADING.match(text):
        text = text[below.end() :]
    text = text.strip()
    while hedge := _HEDGE.match(text):
        text = text[hedge.end() :]
    for opening, closing in _WRAPPERS:
        if text.startswith(opening) and not (opening == "$" and _CURRENCY.match(text)):
            rest = text[len(opening) :]
            closed = re.search(rf"(?<!\\){re.escape(closing)}", rest)
            inside = rest[: closed.start()].strip() if closed else ""
            if closed and inside and closing in ("$", "$$", "\\)", "\\]"):
                return _listed(inside.rstrip(" ."), rest[closed.end() :])
            if inside and "\n" not in inside:
                return _clause(inside)
    text = _BOLD.sub(r"\1", text).lstrip("*_` ")
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip().rstrip("*_` ").strip()


def _listed(formula: str, rest: str) -> str:
    """The formula with those that follow it as members of the same list: $2$ and $5$."""
    members, end = [formula], 0
    while found := _NEXT_FORMULA.match(rest, end):
        members.append((found[1] or found[2]).strip())
        end = found.end()
    return ", ".join(members)


def _answer_of(clause: str) -> str:
    """The value in a clause of prose ("18 dollars, because ..."); a clause that is no prose as it is."""
    short = _REASON.split(clause, maxsplit=1)[0].strip().rstrip(",") or clause
    if "\\" in short or len(_PROSE.findall(short)) <= 3:
        return short
    formulas = _FORMULA.findall(short)
    if formulas:
        return "".join(formulas[-1]).strip()
    numbers = _VALUE.findall(short)
    if len(numbers) > 1:
        numbers = _VALUE.findall(clause)[-1:]
    return numbers[0].replace(",", "") if numbers else short


def _stated(text: str) -> str | None:
    """What the last "the answer is" introduces; one that introduces a number or formula goes before "the answer is
    clear"."""
    clauses = [clause for found in list(_PHRASE.finditer(text))[-10:] if (clause := _clause(text[found.end() :]))]
    if not clauses:
        return None
    return _answer_of(next((clause for clause in reversed(clauses) if re.search(r"[\d\\]", clause)), clauses[-1]))


def _called_the_answer(text: str) -> str | None:
    """The value of the last "18 is the answer"."""
    for said in reversed(list(_IS_THE_ANSWER.finditer(text))[-10:]):
        before = text[max(0, said.start() - _LONGEST_VALUE) : said.start()]
        last = next(reversed(list(_VALUE.finditer(before))), None)
        if last and last.end() == len(before):
            return last[0].replace(",", "")
    return None


def _solutions(text: str) -> str | None:
    """The list that the text ends in, where its members have one name: $x = 1$ and $x = -2$."""
    found = _SOLUTIONS.search(text)
    if not found:
        return None
    members = _FORMULA.findall(found[0])
    return ", ".join("".join(member).strip() for member in members)


def _last_bold(text: str) -> str | None:
    """The words in bold that a text without any value ends in: "The fastest is **Evelyn**."."""
    bold = [found for found in _BOLD.finditer(text) if len(found[1]) <= _LONGEST_VALUE]
    return bold[-1][1].rstrip(" .:") if bold and not text[bold[-1].end() :].strip(" .!") else None


def _last_value(text: str) -> str | None:
    """The last number, fraction or time of day; where it stands in a formula, what the formula ends in."""
    numbers, formulas = list(_VALUE.finditer(text)), list(_FORMULA.finditer(text))
    last = numbers[-1] if numbers else None
    for formula in reversed(formulas):
        if last and formula.end() <= last.start():
            break
        inside = next((group for group in formula.groups() if group), "")
        inside = _ALIGNMENT.sub(" ", inside) if _ENVIRONMENT.search(inside) else inside
        side = re.split(r"=|\\approx(?![a-z])", _ENVIRONMENT.sub(" ", inside))[-1].strip(" .,\n")
        if (last is None or formula.start() < last.start()) and side and "<" not in side:
            return side
    return last[0].replace(",", "") if last else None


def final_answer(response: str) -> str | None:
    """The final answer of a worked solution as it is written, or None where there is nothing that could be one."""
    text = conclusion(response)
    in_box = _boxed_list(text)
    if in_box is not None:
        return in_box or None
    hashes = _HASHES.findall(text)
    data = _clause(hashes[-1]) if hashes else stated_as_data(text)
    stated = data or _stated(text) or _called_the_answer(text)
    return stated or _solutions(text) or _last_value(text) or _last_bold(text)
