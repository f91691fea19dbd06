"""Whether two mathematical answers are the same: as text, as numbers, piece by piece, and only then by algebra.

Always (gold, pred). What algebra alone gets wrong is decided before it: a per cent sign that only one side has,
numerals in a base, units of another scale, (1, 2) as a point or an interval, lists and sets in any order. It does not
find the answer in a response; `s2t_models.answers.final_answer` does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from pipelines.grading import algebra
from s2t_models.answers.latex_text import (
    LONGEST,
    THREE_DIGITS,
    based,
    canonical,
    clean,
    is_percent,
    last_side,
    undressed,
    value_side,
)
from s2t_models.answers.numbers import number
from s2t_models.answers.units import scale

#: Of a rounded decimal against an exact value that is no integer, as in the Qwen2.5-Math grader.
RELATIVE_TOLERANCE = Fraction(1, 10_000)

_OPENING, _CLOSING = "([{", ")]}"


def split_top(text: str, separator: str = ",") -> list[str]:
    """The parts of a text between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character == separator and depth <= 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]]]


def _bracketed(text: str) -> tuple[str, str, list[str]] | None:
    """Opening bracket, closing bracket and parts of a text that is one bracket, such as (1,2], \\{1,2\\} or \\langle
    1,2\\rangle."""
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    text = text.replace("\\{", "{").replace("\\}", "}")
    if len(text) < 2 or text[0] not in _OPENING or text[-1] not in _CLOSING:
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and index < len(text) - 1:
            return None
    parts = split_top(text[1:-1])
    return (text[0], text[-1], parts) if len(parts) > 1 or text[0] == "{" else None


def _matrix(text: str) -> list[list[str]] | None:
    found = re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text.strip())
    if not found:
        return None
    rows = [row.strip() for row in found[1].split("\\\\") if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def alternatives(text: str) -> list[str]:
    """The members of a list of values: commas, semicolons, "and", "or"; a value with one \\pm counts as two."""
    text = re.sub(r"\s+(?:and|or)\s+|\s*;\s*|\\cup", lambda m: m[0] if m[0] == "\\cup" else ",", text)
    members = []
    for part in split_top(text):
        if part.count("\\pm") == 1:
            plus, minus = part.replace("\\pm", "+").lstrip("+ "), part.replace("\\pm", "-")
            members += [re.sub(r"(?<=[=,])\+", "", plus), minus]
        elif part:
            members.append(part)
    return members


def _same_members(gold: Sequence[str], pred: Sequence[str], tolerance: float | None) -> bool:
    """Whether the lists hold the same values in some order, or where each member has a name, by name."""
    if len(gold) != len(pred):
        return False
    gold_named, pred_named = (
        {name.replace(" ", ""): value for name, equals, value in (member.partition("=") for member in side) if equals}
        for side in (gold, pred)
    )
    if len(gold_named) == len(gold) and gold_named.keys() == pred_named.keys():
        return all(_same(value.strip(), pred_named[name].strip(), tolerance) for name, value in gold_named.items())
    left = list(pred)
    for value in gold:
        match = next((other for other in left if _same(value, other, tolerance)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _numbers_agree(gold: Fraction, pred: Fraction, written: tuple[str, str], tolerance: float | None) -> bool:
    if gold == pred:
        return True
    if tolerance is not None:
        return abs(gold - pred) <= Fraction(str(tolerance))
    rounded = any("." in text for text in written)
    return rounded and gold.denominator != 1 and abs(gold - pred) <= RELATIVE_TOLERANCE * max(abs(gold), abs(pred))


def _sides(gold: str, pred: str) -> tuple[str, str]:
    """`x =` taken off where only one side has it, or where both name the same; a chain a = b = c answers its last
    member."""
    if min(gold.count("="), pred.count("=")) > 1 and len(alternatives(gold)) > 1:  # a=3, b=2: each name counts
        return gold, pred
    if pred.count("=") > gold.count("=") and len(alternatives(pred)) == 1 and (pred.count("=") > 1 or "=" not in gold):
        pred = last_side(pred)
    if gold.count("=") == 1 and "=" not in pred and not re.search(r"[-+*/^,]|frac", gold.split("=")[0]):
        gold = last_side(gold)
    if gold.count("=") > 1 and "=" not in pred:  # a=2, b=3, whose members are compared one by one
        return gold, pred
    if ("=" in gold) != ("=" in pred) or "\\in" in gold + pred:
        return value_side(gold), value_side(pred)
    gold_value, pred_value = value_side(gold), value_side(pred)
    same_name = gold[: -len(gold_value) or None].replace(" ", "") == pred[: -len(pred_value) or None].replace(" ", "")
    return (gold_value, pred_value) if same_name else (gold, pred)


def _same(gold: str, pred: str, tolerance: float | None) -> bool:
    """Equality of two cleaned answers."""
    if "\\approx" in pred and "\\approx" not in gold:
        return any(_same(gold, part.strip(), tolerance) for part in pred.split("\\approx") if part.strip())
    if ("\\pmod" in gold) != ("\\pmod" in pred):  # x \equiv 3 \pmod 7 for 3
        gold, pred = (text.split("\\pmod")[0].rpartition("\\equiv")[2].strip() for text in (gold, pred))
    gold, pred = _sides(gold, pred)
    if canonical(gold) == canonical(pred):
        return True
    gold_number, pred_number = number(gold), number(pred)
    if gold_number is not None and pred_number is not None:
        return _numbers_agree(gold_number, pred_number, (gold, pred), tolerance)
    gold_based, pred_based = based(gold), based(pred)
    if gold_based or pred_based:
        return gold_based == pred_based
    clocks = [re.fullmatch(r"(\d{1,2}:\d\d)\s?([ap]m)?", text) for text in (gold, pred)]
    if clocks[0] and clocks[1]:
        return clocks[0][1] == clocks[1][1] and None in (clocks[0][2], clocks[1][2])
    if re.fullmatch(r"\(?[A-Z]\)?", gold) and (letter := re.match(r"\(([A-Z])\)", pred)):
        return letter[1] == gold.strip("()")
    if (lettered := re.match(r"\([A-J]\)\s", pred)) and not gold.startswith("("):  # a contest's (B) 204
        return _same(gold, pred[lettered.end() :], tolerance)
    return _same_parts(gold, pred, tolerance)


def _same_parts(gold: str, pred: str, tolerance: float | None) -> bool:
    """Equality piece by piece: matrices, unions, points and intervals in their order, lists and sets in any; of single
    values by algebra."""
    if (gold_matrix := _matrix(gold)) is not None and (pred_matrix := _matrix(pred)) is not None:
        return [len(row) for row in gold_matrix] == [len(row) for row in pred_matrix] and all(
            _in_order(gold_row, pred_row, tolerance)
            for gold_row, pred_row in zip(gold_matrix, pred_matrix, strict=True)
        )
    if "\\cup" in gold or "\\cup" in pred:
        gold_parts, pred_parts = (
            [part for piece in text.split("\\cup") for part in _ranges(piece)]
            if "\\cup" in text
            else alternatives(text)
            for text in (gold, pred)
        )
        return _same_members(gold_parts, pred_parts, tolerance)
    gold_bracket, pred_bracket = _bracketed(gold), _bracketed(pred)
    if gold_bracket and pred_bracket and "{" not in gold_bracket[0] + pred_bracket[0]:
        return gold_bracket[:2] == pred_bracket[:2] and _in_order(gold_bracket[2], pred_bracket[2], tolerance)
    gold_members, pred_members = _members(gold, gold_bracket), _members(pred, pred_bracket)
    for bracket, bare in ((gold_bracket, pred_members), (pred_bracket, gold_members)):
        if bracket and bracket[:2] == ("(", ")") and len(bare) > 1:  # a point whose brackets one side left out
            return _in_order(*((bracket[2], bare) if bracket is gold_bracket else (bare, bracket[2])), tolerance)
    if len(gold_members) > 1 or len(pred_members) > 1:
        names = [member.split("=")[0].strip() for member in gold_members if "=" in member]
        if len(set(names)) == len(gold_members) and "=" not in pred and "_" not in gold:
            return _in_order(gold_members, pred_members, tolerance)  # a=2, b=3 against 2, 3
        if len(gold_members) == 1:  # one value written twice: \frac12 or 0.5
            return all(_same(gold, member, tolerance) for member in pred_members)
        return _same_members(gold_members, pred_members, tolerance)
    if not _needs_algebra(gold_members[0] if gold_members else gold, pred_members[0] if pred_members else pred):
        return False
    return algebra.shared().equal(gold, pred, tolerance)


def _ranges(text: str) -> list[str]:
    """The members of x < 1 or x > 2; anything else as it is."""
    return alternatives(text) if re.search(r"[<>]|\\[lg]e(?![a-z])", text) else [text.strip()]


def _in_order(gold: Sequence[str], pred: Sequence[str], tolerance: float | None) -> bool:
    return len(gold) == len(pred) and all(_same(g, p, tolerance) for g, p in zip(gold, pred, strict=True))


def _members(text: str, bracket: tuple[str, str, list[str]] | None) -> list[str]:
    if bracket and bracket[0] == "{":
        return [member for part in bracket[2] for member in alternatives(part)]
    return [text] if bracket else alternatives(text)


def _needs_algebra(gold: str, pred: str) -> bool:
    """False where no algebra could make them equal: words, an equation and a value, or too long to be an answer."""
    words = re.compile(r"[A-Za-z]{3,}(?:\s+[A-Za-z]+)*")
    if any(len(text) > LONGEST or not text for text in (gold, pred)):
        return False
    return ("=" in gold) == ("=" in pred) and not any(words.fullmatch(text) for text in (gold, pred))


def equal(gold: str, pred: str, *, percent_asked: bool = False, tolerance: float | None = None) -> bool:
    """Whether `pred` is the same answer as `gold`.

    Args:
        percent_asked: the question asks for a percentage, so that `10` and `10\\%` say the same.
        tolerance: largest absolute difference of two numbers (OlympiadBench's `error`).
    """
    if not pred.strip():
        return False
    if "".join(gold.split()) == "".join(pred.split()):
        return True
    if max(len(gold), len(pred)) > LONGEST:
        return False
    if is_percent(gold) != is_percent(pred):
        # One side in per cent, the other not: the same as values, 50% = 0.5, or where the sign is only the unit asked
        # for.
        values = [number(text) for text in (gold, pred)]
        hundredth = [
            value / 100 if value and is_percent(text) else value
            for text, value in zip((gold, pred), values, strict=True)
        ]
        if not percent_asked or (hundredth[0] is not None and hundredth[0] == hundredth[1]):
            return hundredth[0] is not None and hundredth[0] == hundredth[1]
    scales = [scale(undressed(text)) for text in (gold, pred)]
    if None not in scales and scales[0] != scales[1]:
        return False
    if canonical(gold) == canonical(pred):
        return True
    return _same(clean(gold), clean(pred), tolerance) or _other_reading(gold, pred, tolerance)


def _other_reading(gold: str, pred: str, tolerance: float | None) -> bool:
    """Three digits after a comma may be a thousands separator or the next member of a list: the reading `clean` did not
    take."""
    compact, compact_gold = (re.sub(r"\\!|\s|\$", "", text) for text in (pred, gold))
    if not THREE_DIGITS.fullmatch(compact):
        return False
    joined = Fraction(compact.replace(",", ""))
    return number(gold) == joined or _same_members(alternatives(compact_gold), compact.split(","), tolerance)
