"""The process that math-verify runs in: one JSON request a line on stdin, one answer a line on stdout.

math-verify guards itself with SIGALRM, which works in a main thread only and does not stop a stuck C call. Here it runs
without that guard, under a CPU timer whose signal ends the whole process; its owner (`algebra`) starts another. It
imports nothing of this project, so that it starts quickly.

The argument is the CPU time, in seconds, that one question may take. Request {"gold": LaTeX, "pred": LaTeX,
"tolerance": float | null}; answer {"equal": bool}.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from dataclasses import replace
from typing import Any

ROUNDING = 1e-4  # relative, of a rounded decimal against an exact value that is no integer (`maths.RELATIVE_TOLERANCE`)
FLOATS = 1e-12  # relative, of decimals that were worked out
DIGITS = 60  # to which exact numbers are compared, however small or large they are


def whole(parsed: list) -> Any:
    """The expression that math-verify read, with i as the imaginary unit, or None where it fell back to text."""
    from sympy import I

    value: Any = next((value for value in parsed if not isinstance(value, str)), None)
    symbols = getattr(value, "free_symbols", ())
    return value.subs({symbol: I for symbol in symbols if symbol.name == "i"}) if symbols else value


def number(expression: Any) -> Any:
    """The value, exact where it is rational, else to DIGITS digits; None for what is no finite number."""
    if not getattr(expression, "is_number", False):
        return None
    exact = expression.doit()
    if exact.is_Rational:
        return exact
    value = exact.evalf(DIGITS)
    return (
        value
        if value.is_finite and all(part.is_Float or part.is_Integer or part == 0 for part in value.as_real_imag())
        else None
    )


def equal(gold: str, pred: str, tolerance: float | None) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Only the LaTeX reader: the fallback for plain numbers would read `1` out of anything it cannot parse. Units are
    # off already; math-verify would take the h of \pi r^2 h for hours.
    reading = replace(LatexExtractionConfig().normalization_config, units=False)
    config = (LatexExtractionConfig(normalization_config=reading),)
    gold_parsed = parse(f"${gold}$", extraction_config=config, parsing_timeout=None)
    pred_parsed = parse(f"${pred}$", extraction_config=config, parsing_timeout=None)
    gold_value, pred_value = whole(gold_parsed), whole(pred_parsed)
    if gold_value is None or pred_value is None:
        return False
    gold_number, pred_number = number(gold_value), number(pred_value)
    if gold_number is None or pred_number is None:
        return bool(verify([gold_value], [pred_value], timeout_seconds=None, allow_set_relation_comp=True))
    difference, size = abs(gold_number - pred_number), max(abs(gold_number), abs(pred_number))
    if tolerance is not None:
        return bool(difference <= tolerance)
    if any(re.search(r"\d\.\d", text) for text in (gold, pred)):
        return bool(difference <= size * (FLOATS if getattr(gold_value, "is_integer", False) else ROUNDING))
    if gold_number.is_Rational and pred_number.is_Rational:
        return bool(gold_number == pred_number)
    if size == difference:  # one of them is zero, so that only the exact difference tells
        return (gold_value - pred_value).equals(0) is True
    return bool(difference <= size * 10.0 ** (10 - DIGITS))


def main() -> None:
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (its import is not to count as the first question's time)

    cpu_seconds = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # parsers print
    gibibytes = 4
    resource.setrlimit(resource.RLIMIT_AS, (gibibytes << 30, gibibytes << 30))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        try:
            verdict = equal(request["gold"], request["pred"], request["tolerance"])
        except Exception:
            # Whatever a parser of free text raises, the two were not shown to be equal.
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps({"equal": verdict}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
