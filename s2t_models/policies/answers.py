"""The final answer of a solution's text, enough to vote over samples and to see that a solution is finished.

It is not a grader: it knows no equivalent forms beyond spaces and thousands separators.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{...}`, braces nested; None where there is none."""
    found = None
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                found = text[match.end() : position]
                break
    return found


def answer_key(text: str) -> str | None:
    """What samples are voted by: the last boxed content, else the last number; None where there is neither."""
    answer = boxed(text)
    if answer is None:
        numbers = _NUMBER.findall(text)
        if not numbers:
            return None
        answer = numbers[-1]
    answer = "".join(answer.split())
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
