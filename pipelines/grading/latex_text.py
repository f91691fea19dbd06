"""One spelling for a short mathematical answer: LaTeX dressing, units and separators taken off, fractions written one way.

Pure text; it proves nothing equal that is not the same text afterwards. What needs algebra is left to `maths`.
"""

from __future__ import annotations

import re

_UNWRAPPED = r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathbb|mathcal|mathit|mathsf|bm|boldsymbol|operatorname|mbox|hbox)\*?"
_WRAPPED = re.compile(_UNWRAPPED + r"\s*\{([^{}]*)\}")
_DISPLAY = re.compile(r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?")
_SPACES = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad|qquad|thinspace|enspace)|~")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])|°|\\?\bdeg(?:rees?)?\b")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])(-?\d{1,3}(?:,\d{3})+)(?![\d,)\]}])")
THREE_DIGITS = re.compile(r"-?\d{1,3}(?:,\d{3})+")
_TRAILING_ZEROS = re.compile(r"(\d+)\.0+(?!\d)|(\d+\.\d*?[1-9])0+(?!\d)")
_LEADING_ZEROS = re.compile(r"(?<![\d._^])0+(?=\d)(?!0\.)")
_BARE_DECIMAL = re.compile(r"(?<!\d)\.(?=\d)")
_SLASH = re.compile(r"^(-?)(\d+)/(\d+)$")
_ASSIGNED = re.compile(
    r"^(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z]\)|\\angle\s*[A-Z]{3})\s*(?:=|\\in(?![a-z])|\\approx)\s*"
)
_TAIL_UNIT = re.compile(
    r"(?<=[\d})\]])\s*\\(?:text|mbox|mathrm|textrm|hbox)\s*\{\s*([^{}]*)\}\s*(?:\^\s*\{?\d\}?)?\s*$"
)
_WORD_UNIT = re.compile(
    r"(?<=[\d})])\s*(?:square|cubic|sq\.?|cu\.?)?\s*"
    r"(?:units?|dollars?|cents?|inch(?:es)?|feet|foot|ft|yards?|miles?|mph|kmph|meters?|metres?|centimeters?|centimetres?|"
    r"kilometers?|kilometres?|km/h|km|cm|mm|kg|grams?|kilograms?|pounds?|lbs?|ounces?|liters?|litres?|gallons?|seconds?|"
    r"minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|people|students?|ways?|times|apples?|degrees?|radians?|points?)"
    r"(?:/\w+|\s+(?:per|an?|of|in|and|each|old|tall|long)\b.*)?\s*(?:\^\s*\{?\d\}?)?\s*$",
    re.IGNORECASE,
)
# In a sentence's last clause ("18 dollars every day") any run of words after a number is no part of the value.
_WORDS_AFTER_NUMBER = re.compile(r"^(-?[\d.,/]+)(?:\s+[a-zA-Z][a-zA-Z'\-]+)+$")
_NUMBER_NAMES = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
NUMBER_WORDS = {name: str(value) for value, name in enumerate(_NUMBER_NAMES)}


def is_percent(answer: str) -> bool:
    """Whether the answer ends in a per cent sign or word."""
    return re.search(r"(\\?%|\bper\s?cent(?:age)?)[\s}$.]*$", answer.strip()) is not None


def based(answer: str) -> tuple[str, str] | None:
    """Digits and base of a numeral such as 52_8 or 4210_{5}; None for anything else."""
    found = re.fullmatch(r"\s*\$?\(?([0-9A-Fa-f]+)\)?_\{?(\d+|\\text\{\w+\})\}?\$?\s*", answer)
    return (found[1].lstrip("0") or "0", found[2]) if found else None


def _braced_arguments(text: str) -> str:
    """\\frac12 and \\sqrt3 with their braces."""
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*([^\s{\\])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac\s+\{", r"\\frac{", text)
    return re.sub(r"\\sqrt\s*([^\s{\[\\])", r"\\sqrt{\1}", text)


def clean(answer: str) -> str:
    """The answer without its dressing, still LaTeX with its spaces: what a parser is given."""
    text = (
        answer.strip()
        .replace("\n", " ")
        .replace("−", "-")
        .replace("–", "-")
        .replace("π", "\\pi")
        .replace("×", "\\times")
    )
    text = text.replace("√", "\\sqrt").replace("∞", "\\infty").replace("\\dots", "\\ldots").replace("\\lbrace", "\\{")
    text = text.replace("\\rbrace", "\\}").replace("\\cdot", "\\cdot ").replace("{,}", ",")
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    text = re.sub(r"(?<![a-zA-Z\\])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:\(|\)|\[|\])", " ", text).replace("\\$", "").replace("$", "")
    text = re.sub(r"\\,(?=\d{3})", "", text)
    text = _DISPLAY.sub("", _SPACES.sub(" ", text))
    text = re.sub(
        r"\\(?:leq|leqslant|geq|geqslant|neq)(?![a-z])",
        lambda m: {"l": "\\le", "g": "\\ge", "n": "\\ne"}[m[0][1]],
        text,
    )
    text = text.replace("bmatrix", "pmatrix").replace("\\infinity", "\\infty")
    text = re.sub(r"\\begin\{(?:array|[vB]?matrix)\}(?:\{[^}]*\})?", r"\\begin{pmatrix}", text)
    text = re.sub(r"\\end\{(?:array|[vB]?matrix)\}", r"\\end{pmatrix}", text)
    text = _DEGREES.sub("", text)
    text = re.sub(r"(\\?%|\bper\s?cent(?:age)?\b)", "", text)
    stripped = _TAIL_UNIT.sub("", text)
    text = stripped.strip() or text
    text = re.sub(r"\\(?:text|mbox|textrm)\s*\{\s*(?:,?\s*and|,?\s*or)\s*\}", ",", text)
    while _WRAPPED.search(text):
        text = _WRAPPED.sub(lambda m: m[1], text)
    text = text.strip().rstrip(".;,").strip()
    text = _WORD_UNIT.sub("", text).strip() or text
    alone = _WORDS_AFTER_NUMBER.match(text)
    text = alone[1] if alone else text
    text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    text = _BARE_DECIMAL.sub("0.", text)
    text = _TRAILING_ZEROS.sub(lambda m: m[1] or m[2], text)
    text = _LEADING_ZEROS.sub("", text)
    text = _braced_arguments(text)
    return re.sub(r"\s+", " ", text).strip()


def value_side(text: str) -> str:
    """What `x =`, `f(x) =`, `x \\in` or `y \\approx` introduces; the text itself where it starts with none of these."""
    return _ASSIGNED.sub("", text, count=1)


def canonical(answer: str) -> str:
    """The one spelling two answers are compared by as text."""
    text = clean(answer)
    if text.count("=") <= 1:
        text = value_side(text)
    text = _SLASH.sub(lambda m: f"{m[1]}\\frac{{{m[2]}}}{{{m[3]}}}", text.replace(" ", ""))
    text = text.replace("\\frac{-", "-\\frac{") if text.startswith("\\frac{-") else text
    letter = re.fullmatch(r"[(\[]?([A-Za-z])[)\].]?", text)
    if letter:
        return letter[1].upper() if text != letter[1] else letter[1]
    if re.fullmatch(r"[A-Za-z' \-]{2,}", text) and "\\" not in text:
        return NUMBER_WORDS.get(text.lower(), text.lower())
    return text
