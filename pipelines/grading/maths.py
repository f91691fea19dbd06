"""Whether two mathematical answers are the same: as text, as numbers, piece by piece, and only then by algebra.

Always (gold, pred). What algebra alone gets wrong is decided before it: a per cent sign that only one side has, numerals in a base,
(1, 2) as a point or an interval, lists and sets in any order. It does not find the answer in a response; `final_answer` does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from pipelines.grading import algebra, latex_text
from pipelines.grading.latex_text import based, canonical, clean, is_percent, value_side

RELATIVE_TOLERANCE = (
    1e-4  # of a rounded decimal against an exact value that is no integer, as in the Qwen2.5-Math grader
)
LONGEST = 1000  # characters; longer answers are only compared as text

_OPENING, _CLOSING = "([{", ")]}"
_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+(?:\.\d+)?)\}\{(-?\d+(?:\.\d+)?)\}")
_MIXED = re.compile(r"(-?)(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}|(-?)(\d+)\s+(\d+)/(\d+)")
_POWER_OF_TEN = re.compile(r"(-?\d+(?:\.\d+)?)\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{(-?\d+)\}|(-?\d))")


def number(answer: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction, mixed number or scientific notation; None for anything else."""
    text = value_side(clean(answer)).replace("\\ ", " ").strip()
    if text.startswith("(") and text.endswith(")") and "," not in text:
        text = text[1:-1].strip()
    sign = -1 if text.startswith("-") else 1
    if mixed := _MIXED.fullmatch(text):
        whole, above, below = map(int, mixed.group(2, 3, 4) if mixed[2] else mixed.group(6, 7, 8))
        return sign * (whole + Fraction(above, below)) if below else None
    if fraction := _FRACTION.fullmatch(text):
        numerator, denominator = Fraction(fraction[2]), Fraction(fraction[3])
        return (-1 if fraction[1] else 1) * numerator / denominator if denominator else None
    if scientific := _POWER_OF_TEN.fullmatch(text):
        exponent = int(scientific[2] or scientific[3])
        return Fraction(scientific[1]) * Fraction(10) ** exponent if abs(exponent) < 400 else None
    plain = text.replace(" ", "").removeprefix("+")
    if re.fullmatch(r"-?\d+(?:\.\d+)?|-?\d+/-?\d+", plain):
        try:
            return Fraction(plain) if "/" not in plain else Fraction(int(plain.split("/")[0]), int(plain.split("/")[1]))
        except ZeroDivisionError:
            return None
    return None


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
    """Opening bracket, closing bracket and parts of a text that is one bracket, such as (1,2], \\{1,2\\} or \\langle 1,2\\rangle."""
    text = text.replace("\\langle", "(").replace("\\rangle", ")")
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{", "}", split_top(text[2:-2])
    if len(text) < 2 or text[0] not in "([" or text[-1] not in ")]":
        return None
    depth = 0
    for index, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth == 0 and index < len(text) - 1:
            return None
    parts = split_top(text[1:-1])
    return (text[0], text[-1], parts) if len(parts) > 1 else None


def _matrix(text: str) -> list[list[str]] | None:
    found = re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text.strip())
    if not found:
        return None
    rows = [row.strip() for row in re.split(r"\\\\(?:\[\w+\])?", found[1]) if row.strip()]
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
    """Whether the lists hold the same values in some order."""
    if len(gold) != len(pred):
        return False
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
    return rounded and gold.denominator != 1 and math.isclose(gold, pred, rel_tol=RELATIVE_TOLERANCE)


def _sides(gold: str, pred: str) -> tuple[str, str]:
    """`x =` taken off where only one side has it, or where both name the same; a chain a = b = c answers its last member."""
    if pred.count("=") > 1 and gold.count("=") <= 1 and len(alternatives(pred)) == 1:
        pred = pred.rsplit("=", 1)[1].strip()
    if ("=" in gold) != ("=" in pred) or "\\in" in gold + pred or "\\approx" in pred:
        return value_side(gold), value_side(pred)
    gold_value, pred_value = value_side(gold), value_side(pred)
    same_name = gold[: -len(gold_value) or None].replace(" ", "") == pred[: -len(pred_value) or None].replace(" ", "")
    return (gold_value, pred_value) if same_name else (gold, pred)


def _same(gold: str, pred: str, tolerance: float | None) -> bool:
    """Equality of two cleaned answers."""
    gold, pred = _sides(gold, pred)
    if canonical(gold) == canonical(pred):
        return True
    gold_number, pred_number = number(gold), number(pred)
    if gold_number is not None and pred_number is not None:
        return _numbers_agree(gold_number, pred_number, (gold, pred), tolerance)
    gold_based, pred_based = based(gold), based(pred)
    if gold_based or pred_based:
        return gold_based == pred_based
    if (gold_matrix := _matrix(gold)) is not None and (pred_matrix := _matrix(pred)) is not None:
        return [len(row) for row in gold_matrix] == [len(row) for row in pred_matrix] and all(
            _same(g, p, tolerance)
            for gold_row, pred_row in zip(gold_matrix, pred_matrix, strict=True)
            for g, p in zip(gold_row, pred_row, strict=True)
        )
    if "\\cup" in gold or "\\cup" in pred:
        return _same_members(gold.split("\\cup"), pred.split("\\cup"), tolerance)
    gold_bracket, pred_bracket = _bracketed(gold), _bracketed(pred)
    if gold_bracket and pred_bracket and "{" not in gold_bracket[0] + pred_bracket[0]:
        ordered = gold_bracket[:2] == pred_bracket[:2] and len(gold_bracket[2]) == len(pred_bracket[2])
        return ordered and all(_same(g, p, tolerance) for g, p in zip(gold_bracket[2], pred_bracket[2], strict=True))
    gold_members = _members(gold, gold_bracket)
    pred_members = _members(pred, pred_bracket)
    if len(gold_members) > 1 or len(pred_members) > 1:
        return _same_members(gold_members, pred_members, tolerance)
    if not _needs_algebra(gold_members[0] if gold_members else gold, pred_members[0] if pred_members else pred):
        return False
    return algebra.shared().equal(gold, pred, tolerance)


def _members(text: str, bracket: tuple[str, str, list[str]] | None) -> list[str]:
    if bracket and bracket[0] == "{":
        return [member for part in bracket[2] for member in alternatives(part)]
    return [text] if bracket else alternatives(text)


def _needs_algebra(gold: str, pred: str) -> bool:
    """False where no algebra could make them equal: words, or too long to be an answer."""
    words = re.compile(r"[A-Za-z]{3,}(?:\s+[A-Za-z]+)*")
    if any(len(text) > LONGEST or not text for text in (gold, pred)):
        return False
    return not any(words.fullmatch(text) for text in (gold, pred))


def equal(gold: str, pred: str, *, percent_asked: bool = False, tolerance: float | None = None) -> bool:
    """Whether `pred` is the same answer as `gold`.

    Args:
        percent_asked: the question asks for a percentage, so that `10` and `10\\%` say the same.
        tolerance: largest absolute difference of two numbers (OlympiadBench's `error`).
    """
    if not pred.strip():
        return False
    if is_percent(gold) != is_percent(pred) and not percent_asked:
        # One side in per cent, the other not: the same only as values, 50% = 0.5.
        hundredth = [number(text) for text in (gold, pred)]
        if hundredth[0] is None or hundredth[1] is None:
            return False
        values = [
            value / 100 if is_percent(text) else value
            for text, value in zip((gold, pred), hundredth, strict=True)
            if value is not None
        ]
        return values[0] == values[1]
    if canonical(gold) == canonical(pred):
        return True
    cleaned_gold, cleaned_pred = clean(gold), clean(pred)
    if _same(cleaned_gold, cleaned_pred, tolerance):
        return True
    return _other_reading(gold, pred, tolerance)


def _other_reading(gold: str, pred: str, tolerance: float | None) -> bool:
    """Three digits after a comma may be a thousands separator or the next member of a list: the reading `clean` did not take."""
    compact, compact_gold = (re.sub(r"\\!|\s|\$", "", text) for text in (pred, gold))
    if not latex_text.THREE_DIGITS.fullmatch(compact):
        return False
    joined = Fraction(compact.replace(",", ""))
    return number(gold) == joined or _same_members(alternatives(compact_gold), compact.split(","), tolerance)
