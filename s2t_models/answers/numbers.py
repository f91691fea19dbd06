"""The exact value of a short answer that is a number."""

from __future__ import annotations

import re
from fractions import Fraction

from s2t_models.answers.latex_text import LONGEST, clean, value_side

MOST_EXPONENT = 400  # of ten, or of a power that is worked out

_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+(?:\.\d+)?)\}\{(-?\d+(?:\.\d+)?)\}")
_MIXED = re.compile(r"-?(\d+)\s*(?:and\s)?\\frac\{(\d+)\}\{(\d+)\}|-?(\d+)\s+(?:and\s)?(\d+)/(\d+)")
_POWER_OF_TEN = re.compile(
    r"(-?\d+(?:\.\d+)?)\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))|[eE]([-+]?\d+))"
)
_POWER = re.compile(r"(-?)(\d+)\s*\^\s*(?:\{\s*(-?\d+)\s*\}|(-?\d))")
_REPEATING = re.compile(
    r"(-?)(\d+)\.(\d*?)(?:\s?\\(?:overline|bar|dot)\s?\{?(\d+)\}?|(\d)\5{2,}\s?\\ldots|(\d\d)\6{1,}\s?\\ldots)"
)
_PLAIN = re.compile(r"-?\d+(?:\.\d+)?|-?\d+(?:\.\d+)?/-?\d+(?:\.\d+)?")


def number(answer: str) -> Fraction | None:
    """The value of an integer, decimal (also a repeating one), fraction, mixed number, power or scientific notation;
    None for anything else, and for numbers of more than LONGEST digits."""
    text = value_side(clean(answer)).replace("\\ ", " ").strip()
    if len(text) > LONGEST:
        return None
    while text.startswith(("(", "{")) and text.endswith((")", "}")) and "," not in text:
        text = text[1:-1].strip()
    sign = -1 if text.startswith("-") else 1
    if mixed := _MIXED.fullmatch(text):
        whole, above, below = map(int, mixed.group(1, 2, 3) if mixed[1] else mixed.group(4, 5, 6))
        return sign * (whole + Fraction(above, below)) if below else None
    if fraction := _FRACTION.fullmatch(text):
        return _ratio(fraction[2], fraction[3], negative=bool(fraction[1]))
    if scientific := _POWER_OF_TEN.fullmatch(text):
        return _power(Fraction(10), scientific[2] or scientific[3] or scientific[4], Fraction(scientific[1]))
    if power := _POWER.fullmatch(text):
        return _power(Fraction(power[2]), power[3] or power[4], Fraction(sign))
    if repeating := _REPEATING.fullmatch(text):
        return sign * _repeating(repeating[2], repeating[3], repeating[4] or repeating[5] or repeating[6])
    plain = text.replace(" ", "").removeprefix("+")
    if not _PLAIN.fullmatch(plain):
        return None
    above_text, _, below_text = plain.partition("/")
    return _ratio(above_text, below_text or "1")


def _ratio(above: str, below: str, negative: bool = False) -> Fraction | None:
    if not Fraction(below):
        return None
    value = Fraction(above) / Fraction(below)
    return -value if negative else value


def _repeating(whole: str, before: str, period: str) -> Fraction:
    """whole.before with the period behind it, for ever."""
    places = 10 ** len(before)
    return int(whole) + Fraction(int(before or "0"), places) + Fraction(int(period), places * (10 ** len(period) - 1))


def _power(base: Fraction, exponent: str, factor: Fraction) -> Fraction | None:
    """factor * base ** exponent, where that has no more than some thousand digits."""
    if (
        len(exponent) > 5
        or abs(int(exponent)) > MOST_EXPONENT
        or len(str(base)) > 20
        or (not base and int(exponent) < 0)
    ):
        return None
    return factor * base ** int(exponent)
