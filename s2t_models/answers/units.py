"""Units behind a number: taking them off, and telling centimetres from kilometres."""

from __future__ import annotations

import re

#: Every way to write a unit whose scale matters, with the one symbol it is compared by.
_SCALED = {
    symbol: symbol
    for symbol in (
        "mm",
        "cm",
        "m",
        "km",
        "mg",
        "g",
        "kg",
        "ms",
        "s",
        "min",
        "h",
        "ml",
        "l",
        "in",
        "ft",
        "yd",
        "mi",
        "lb",
        "oz",
    )
}
_SCALED |= {
    spelling: symbol
    for symbol, spellings in {
        "mm": "millimeter millimetre",
        "cm": "centimeter centimetre",
        "m": "meter metre",
        "km": "kilometer kilometre",
        "g": "gram",
        "kg": "kilogram",
        "s": "second sec",
        "min": "minute",
        "h": "hour hr",
        "day": "day",
        "week": "week",
        "month": "month",
        "year": "year",
        "ml": "milliliter millilitre",
        "l": "liter litre",
        "in": "inch inche",
        "ft": "foot feet",
        "yd": "yard",
        "mi": "mile",
        "lb": "pound",
        "oz": "ounce",
        "cent": "cent",
        "dollar": "dollar",
    }.items()
    for spelling in spellings.split()
}
_WORDS = (
    r"units?|people|students?|ways?|times|apples?|points?|degrees?|radians?|dollars?|cents?|euros?|USD|EUR"
    r"|inch(?:es)?|feet|foot|ft|yards?|miles?|meters?|metres?|centimeters?|centimetres?|millimeters?|millimetres?"
    r"|kilometers?|kilometres?|km|cm|mm|mph|kmph|km/h|kg|mg|grams?|kilograms?|pounds?|lbs?|ounces?|oz"
    r"|liters?|litres?|ml|gallons?|seconds?|secs?|minutes?|mins?|hours?|hrs?|days?|weeks?|months?|years?"
    r"|joules?|newtons?|watts?|volts?|amps?"
)
#: Only behind a number and a space: 5m may be 5 times m, and the h of r^2 h is a height.
_LETTERS = (
    r"(?:(?<=\d\s)(?<![a-z]\^\d\s)|(?<=\d\}\s)(?<![a-z]\^\{\d\}\s))"
    r"(?-i:m|s|g|L|h|N|J|W|V|Hz|Pa|m/s|N/m|mol)(?=$|\s?\^|/)"
)
_NUMBER_BEFORE = r"(?:(?<=[\d})\]])|(?<=\\pi))"
_POWER = r"\s*(?:\^\s*\{?-?\d\}?)?\s*$"
TAIL_UNIT = re.compile(
    _NUMBER_BEFORE + r"\s*\\(?:text|mbox|mathrm|textrm|hbox|operatorname)\s*\{"
    r"(?!\s*(?:,?\s*(?:and|or)\b|[ap]\.?\s?m\b|[ie]\s*\}))([^{}]*)\}" + _POWER
)
WORD_UNIT = re.compile(
    _NUMBER_BEFORE + rf"\s*(?:/\s*|per\s+)?(?:square|cubic|sq\.?|cu\.?)?\s*(?:{_WORDS}|{_LETTERS})"
    r"(?:/\w+|\s+(?:per|an?|of|in|and|each|old|tall|long)\b.*)?" + _POWER,
    re.IGNORECASE,
)
#: Words only: the h of 2\\pi h is a height.
PI_UNIT = re.compile(rf"(?<=\\pi)\s*(?:square|cubic|sq\.?|cu\.?)?\s*(?:{_WORDS})\s*(?:\^\s*\{{?-?\d\}}?)?\s*$")
_BEHIND = re.compile(
    r"\d\}*\s?(?:\\(?:text|mbox|mathrm|textrm|hbox)\s?\{\s?)?([a-zA-Z]+)\.?\s?\}?(\s?\^\s?\{?\d\}?)?\s?$"
)


def scale(undressed: str) -> str | None:
    """The unit behind the number at the end, by its one symbol, such as `cm` or `cm2`; None where there is none whose
    scale is known."""
    found = _BEHIND.search(undressed[-60:])
    if not found:
        return None
    word = found[1]
    symbol = _SCALED.get(word) or _SCALED.get(word.lower()) or _SCALED.get(word.lower().removesuffix("s"))
    return symbol and symbol + re.sub(r"\D", "", found[2] or "")
