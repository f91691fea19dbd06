"""One spelling for a short mathematical answer: LaTeX dressing, units and separators taken off, fractions written one
way.

Pure text; it proves nothing equal that is not the same text afterwards. What needs algebra is left to
`pipelines.grading.maths`.
"""

from __future__ import annotations

import re
import unicodedata

from s2t_models.answers.units import PI_UNIT, TAIL_UNIT, WORD_UNIT

LONGEST = 1000  # characters; a longer text is no short answer and only loses its spaces

_UNWRAPPED = (
    r"\\(?:text|textbf|textit|textrm|textnormal|texttt|emph|mathrm|mathbf|mathbb|mathcal|mathit|mathsf|bm|boldsymbol|"
    r"operatorname|mbox|hbox|underline)\*?"
)
_WRAPPED = re.compile(_UNWRAPPED + r"\s*\{([^{}]*)\}")
_DISPLAY = re.compile(
    r"\\(?:displaystyle|textstyle|limits|left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?"
    r"|\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|it|rm|sf|tt|bfseries|therefore)(?![a-zA-Z])"
    r"|\\(?:text)?color\s?\{[^{}]*\}|\\(?:begin|end)\{(?:align|aligned|gathered|split|equation|cases)\*?\}"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[!,;:> ]|quad|qquad|thinspace|enspace)|~")
_DEGREES = re.compile(
    r"\^\s*\{?\s*\\circ\s*\}?(?:\s?[CF]$)?"
    r"|\\degree(?![a-zA-Z])|°(?:\s?[CF]\b)?|\\?\bdeg(?:rees?)?\b"
)
_LABEL = re.compile(r"^\\text\w*\s?\{[^{}]*(?:\bis|:)\s*\}\s*(?=\S)")
_REALS = re.compile(r"\\mathbb\s?\{?R\}?|\\R(?![a-zA-Z])|ℝ|^(?:\\text\s?\{)?all real numbers\}?$")
#: sin 30° is not sin 30; elsewhere the sign is only a unit.
_ANGLE = re.compile(r"(\d+(?:\.\d+)?)\s?(?:\^\s?\{?\s?\\circ\s?\}?|\\degree(?![a-zA-Z])|°)")
_TRIGONOMETRY = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_LINES = re.compile(r"\\begin\{(?:align|aligned|gathered|split|cases)\*?\}")
#: ]1,2] and [1,2[ for (1,2] and [1,2).
_OUTWARD = re.compile(r"([\[\](])([^\[\]()]+,[^\[\]()]+)([\[\])])")
#: The number again in words, or its currency: 18 (eighteen), 18 (USD).
_GLOSS = re.compile(r"(?<=\d) \([A-Za-z]{3,}[a-z \-]*\)$")
#: The value again, behind an equals sign: \frac12 (=0.5).
_SAME_AGAIN = re.compile(r"(?<=\S)\s?\((?:=|\\approx(?![a-z]))[^()]*\)$")
_WORDS_THEN_NUMBER = re.compile(r"([A-Za-z][A-Za-z \-]*) \((\d+)\)")
_ROW_SPACING = re.compile(r"(?<=\\\\)\[\s?-?[\d.]+\s?[a-z]{2}\s?\]")
#: \log 8/\log 2, a quotient of two logarithms.
_LOGARITHM_ABOVE = re.compile(r"(\\(?:log(?:_\d|_\{\w+\})?|ln))\s*(\d+(?:\.\d+)?)(?=\s*/\s*\\(?:log|ln)(?![a-z]))")
_CURRENCY = re.compile(
    r"[€£¥₹]|\\(?:pounds|euro|textdollar)(?![a-zA-Z])|\bUS\s?(?=\\?\$)|\b(?:USD|EUR|GBP|Rs\.?)(?=\s?\d)"
)
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])(-?\d{1,3}(?:,\d{3})+)(?![\d,)\]}])")
_OTHER_THOUSANDS = re.compile(r"-?\d{1,3}(?:(?: \d{3})+|(?:['’]\d{3})+|(?:_\d{3})+|(?:\.\d{3}){2,})(?:,\d+)?")
THREE_DIGITS = re.compile(r"-?\d{1,3}(?:,\d{3})+")
_TRAILING_ZEROS = re.compile(r"(\d+)\.0+(?!\d)|(\d+\.\d*?[1-9])0+(?!\d)")
_LEADING_ZEROS = re.compile(r"(?<![\d._^:])0+(?=\d)(?!0\.)")
_BARE_DECIMAL = re.compile(r"(?<![\d.])\.(?=\d)")
_SLASH = re.compile(r"^(-?)(\d+)/(\d+)$")
_ASSIGNED = re.compile(
    r"^(?:\\?[a-zA-Z]+(?:_\{?\w+\}?)?|[a-zA-Z]\([a-zA-Z](?:,\s?[a-zA-Z])*\)|\\angle\s*[A-Z]{3})\s*(?:=|\\in(?![a-z])"
    r"|\\approx(?![a-z]))\s*"
)
_HEDGE = re.compile(
    r"^(?:\\approx(?![a-z])|(?:approximately|approx\.?|about|roughly|around|exactly|at least|at most)\s"
    r"|(?:the\s)?(?:final\s)?answer\s?(?:is\s|:))\s*",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"(?<=\d)\s?\^?\s?\{?\s?(?:st|nd|rd|th)\s?\}?$")
_CLOCK = re.compile(r"(?<=\d)\s*([ap])\.?\s?m\b\.?", re.IGNORECASE)
# In a sentence's last clause ("18 dollars every day") any run of words after a number is no part of the value.
_WORDS_AFTER_NUMBER = re.compile(r"^(-?[\d.,/]+)(?!\s(?:and|or)\b)(?:\s+[a-zA-Z][a-zA-Z'\-]+)+$")
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑‒﹣－", "-"),
        **dict.fromkeys("⁄∕", "/"),
        **{
            "π": "\\pi ",
            "×": "\\times ",
            "·": "\\cdot ",
            "⋅": "\\cdot ",
            "÷": "/",
            "√": "\\sqrt",
            "∞": "\\infty ",
            "±": "\\pm ",
        },
        **{
            "≤": "\\le ",
            "≥": "\\ge ",
            "≠": "\\ne ",
            "¢": " cents",
            "≈": "\\approx ",
            "∪": "\\cup ",
            "∩": "\\cap ",
            "∈": "\\in ",
            "∅": "\\emptyset ",
        },
        **{"θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "∘": "°", "º": "°"},
        **dict.fromkeys("\u200b\ufeff\0", ""),
    }
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_EMOJI = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf\ufe0f]")
_VULGAR = re.compile("[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]")
_ONES = [
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
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ALL_REALS = ("allrealnumbers", "allreals", "(-\\infty,\\infty)", "(-\\infty,+\\infty)")
NUMBER_WORDS = {name: str(value) for value, name in enumerate(_ONES)}
NUMBER_WORDS |= {name: str(10 * tens) for tens, name in enumerate(_TENS, start=2)}
NUMBER_WORDS |= {
    f"{tens}-{one}": str(10 * place + value)
    for place, tens in enumerate(_TENS, start=2)
    for value, one in enumerate(_ONES[:10])
    if value
}


def is_percent(answer: str) -> bool:
    """Whether the answer ends in a per cent sign or word."""
    end = answer[-60:].rstrip(" }$.)*")
    return re.search(r"(?:%|\bper\s?cent(?:age)?)$", end) is not None


def based(answer: str) -> tuple[str, str] | None:
    """Digits and base of a numeral such as 52_8, 4210_{5} or 101_{two}; None for anything else."""
    found = re.fullmatch(r"\s*\(?([0-9A-Fa-f]+)\)?\s?_\s?\{?(?:base\s?)?(\d+|[a-z]+)\}?\s*", answer)
    return (found[1].lstrip("0") or "0", NUMBER_WORDS.get(found[2], found[2])) if found else None


def _braced_arguments(text: str) -> str:
    """\\frac12 and \\sqrt3 with their braces."""
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*([^\s{\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*([^\s{\\])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*([^\s{\\])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac\s+\{", r"\\frac{", text)
    text = re.sub(r"\\frac\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}", text)
    return re.sub(r"\\sqrt\s*([^\s{\[\\(])", r"\\sqrt{\1}", text)


def _as_ascii(text: str) -> str:
    """Unicode mathematics as LaTeX: minus signs, superscripts, vulgar fractions, full-width digits."""
    text = _SUPERSCRIPT.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = _VULGAR.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    return unicodedata.normalize("NFKC", _EMOJI.sub("", text).translate(_SIGNS)).translate(_SIGNS)


def undressed(answer: str) -> str:
    """The answer without LaTeX dressing, with its units, signs of percent and separators."""
    text = _REALS.sub(r"(-\\infty,\\infty)", _LABEL.sub("", answer.strip().replace("\n", " ")))
    text = _ROW_SPACING.sub("", _as_ascii(text))
    text = text.replace("\\dots", "\\ldots").replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = text.replace("\\cdot", "\\cdot ").replace("\\varnothing", "\\emptyset ").replace("{,}", ",")
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"\*\*(?=\S)(.*?)\*\*", r"\1", text) if text.startswith("**") else text.replace("**", "^")
    text = text.replace("`", "")
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi ", text)
    text = re.sub(r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty ", text)
    text = re.sub(r"(?<![a-zA-Z\\])\\?sqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = _CURRENCY.sub("", re.sub(r"\\(?:\(|\)|\[|\])", " ", text)).replace("\\$", "").replace("$", "")
    text = re.sub(r"\\,(?=\d{3})", "", text)
    if _LINES.search(text):
        text = text.replace("\\\\", ",").replace("&", "")
    text = _DISPLAY.sub("", _SPACES.sub(" ", text))
    text = re.sub(r"\\(leq|leqslant|geq|geqslant|neq)(?![a-z])", lambda m: f"\\{m[1][:2]}", text)
    text = text.replace("bmatrix", "pmatrix").replace("\\infinity", "\\infty")
    text = re.sub(r"\\begin\{(?:array|[vB]?matrix)\}(?:\{[^}]*\})?", r"\\begin{pmatrix}", text)
    text = re.sub(r"\\end\{(?:array|[vB]?matrix)\}", r"\\end{pmatrix}", text)
    text = re.sub(r"\s+", " ", text.replace("\\lg ", "\\log_{10} ")).strip()
    if interval := _OUTWARD.fullmatch(text):
        text = interval[1].replace("]", "(") + interval[2] + interval[3].replace("[", ")")
    return text


def clean(answer: str) -> str:
    """The answer without its dressing, still LaTeX with its spaces: what a parser is given."""
    if len(answer) > LONGEST:
        return " ".join(answer.split())
    text = undressed(answer)
    if _TRIGONOMETRY.search(text):
        text = _ANGLE.sub(r"(\\frac{\1\\pi}{180})", text)
    text = _SAME_AGAIN.sub("", _GLOSS.sub("", _DEGREES.sub("", text)))
    if (said := _WORDS_THEN_NUMBER.fullmatch(text)) and said[1].lower() in NUMBER_WORDS:
        text = said[2]
    text = re.sub(r"(\\?%|\bper\s?cent(?:age)?\b)", "", text)
    text = TAIL_UNIT.sub("", text).strip() or text
    text = re.sub(r"\\(?:text|mbox|textrm)\s*\{\s*(?:,?\s*and|,?\s*or)\s*\}", ",", text)
    while _WRAPPED.search(text):
        text = _WRAPPED.sub(lambda m: m[1], text)
    text = _CLOCK.sub(lambda m: m[1].lower() + "m", text)
    text = _HEDGE.sub("", text.strip()).rstrip(".;,\\ ").strip()
    text = _ORDINAL.sub("", text)
    text = WORD_UNIT.sub("", PI_UNIT.sub("", text)).strip() or text
    alone = _WORDS_AFTER_NUMBER.match(text)
    text = alone[1] if alone else text
    text = re.sub(r"[ '’_.]", "", text).replace(",", ".") if _OTHER_THOUSANDS.fullmatch(text) else text
    text = _THOUSANDS.sub(lambda m: m[1].replace(",", ""), text)
    text = _BARE_DECIMAL.sub("0.", text)
    text = _TRAILING_ZEROS.sub(lambda m: m[1] or m[2], text)
    text = _LEADING_ZEROS.sub("", text)
    text = _LOGARITHM_ABOVE.sub(r"\1(\2)", _braced_arguments(text))
    return re.sub(r"\s+", " ", text).strip()


def value_side(text: str) -> str:
    """What `x =`, `f(x) =`, `x \\in` or `y \\approx` introduces; the text itself where it starts with none of these."""
    return _ASSIGNED.sub("", text, count=1)


def last_side(text: str) -> str:
    """The last member of an equation or chain a = b = c that states a value; the text itself where it is an equation to
    be solved, such as 2x = 10 or x^2 = 4."""
    left, equals, right = text.rpartition("=")
    if not equals or not right.strip() or left.rstrip().endswith(("<", ">", "!")):
        return text
    first = left.split("=", 1)[0]
    return text if re.search(r"\d\s?[a-zA-Z]|[a-zA-Z]\s?\^", first) and left.count("=") == 0 else right.strip()


def canonical(answer: str) -> str:
    """The one spelling two answers are compared by as text."""
    text = clean(answer)
    if len(text) > LONGEST:
        return text
    if text.count("=") <= 1:
        text = value_side(text)
    elif "," not in text:
        text = last_side(text)
    text = _SLASH.sub(lambda m: f"{m[1]}\\frac{{{m[2]}}}{{{m[3]}}}", text.replace(" ", ""))
    text = text.replace("\\frac{-", "-\\frac{") if text.startswith("\\frac{-") else text
    if text.lower() in _ALL_REALS:
        return "R"
    letter = re.fullmatch(r"[(\[]?([A-Za-z])[)\].]?", text)
    if letter:
        return letter[1].upper() if text != letter[1] else letter[1]
    if re.fullmatch(r"[A-Za-z' \-]{2,}", text):
        return NUMBER_WORDS.get(text.lower(), text.lower())
    return text
