"""The process that math-verify runs in: one JSON request a line on stdin, one answer a line on stdout.

math-verify guards itself with SIGALRM, which works in a main thread only and does not stop a stuck C call. Here it runs without
that guard, under a CPU timer whose signal ends the whole process; its owner (`algebra`) starts another. It imports nothing of this project, so that it starts quickly.

The argument is the CPU time, in seconds, that one question may take. Request {"gold": LaTeX, "pred": LaTeX, "tolerance": float | null}; answer {"equal": bool}.
"""

import json
import logging
import math
import re
import resource
import signal
import sys

ROUNDING = 1e-4  # relative, of a rounded decimal against an exact value that is no integer (`maths.RELATIVE_TOLERANCE`)


def whole(parsed: list) -> object | None:
    """The expression that math-verify read, or None where it fell back to text."""
    return next((value for value in parsed if not isinstance(value, str)), None)


def number(expression: object) -> float | None:
    if not getattr(expression, "is_number", False):
        return None
    try:
        value = complex(expression.evalf(15))  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        return None
    return value.real if value.imag == 0 and abs(value.real) < float("inf") else None


def equal(gold: str, pred: str, tolerance: float | None) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    # Only the LaTeX reader: the fallback for plain numbers would read `1` out of anything it cannot parse.
    config = (LatexExtractionConfig(),)
    gold_parsed = parse(f"${gold}$", extraction_config=config, parsing_timeout=None)
    pred_parsed = parse(f"${pred}$", extraction_config=config, parsing_timeout=None)
    gold_value, pred_value = whole(gold_parsed), whole(pred_parsed)
    if gold_value is None or pred_value is None:
        return False
    gold_number, pred_number = number(gold_value), number(pred_value)
    if gold_number is not None and pred_number is not None:
        if tolerance is not None:
            return abs(gold_number - pred_number) <= tolerance
        if any(re.search(r"\d\.\d", text) for text in (gold, pred)) and not gold_number.is_integer():
            return math.isclose(gold_number, pred_number, rel_tol=ROUNDING)
    return bool(verify([gold_value], [pred_value], timeout_seconds=None))


def main() -> None:
    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  (its import is not to count as the first question's time)

    cpu_seconds = float(sys.argv[1])
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
        sys.stdout.write(json.dumps({"equal": verdict}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
