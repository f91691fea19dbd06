"""What the name of a triggered policy says: s2t-local-k4-w0@0.05 is S2T-Local with 4 candidates, prior weight 0 and a budget of 5%.

s2t[-kl|-entropy|-random][-dynamic-05][-k4][@0.05]   takeover[-entropy|-random][@0.05]   s2t-local[-k4][-w0][@0.05]
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"(?P<stem>s2t-local|s2t|takeover)(?:-(?P<metric>kl|entropy|random))?(?:-dynamic-(?P<percent>\d\d?))?"
    r"(?:-k(?P<k>[1-9]\d{0,3}))?(?:-w(?P<weight>\d{1,4}(?:\.\d+)?))?(?:@(?P<budget>\d*\.?\d+))?"
)


@dataclass(frozen=True)
class Variant:
    """A triggered policy's name taken apart; None is what the name leaves to the recipe. `ratio` sizes a dynamic candidate
    set (Table A4), `kind` is the name without K and budget."""

    kind: str
    stem: str
    metric: str | None
    ratio: float | None
    k: int | None
    weight: float | None
    budget: float | None


def variant(name: str) -> Variant | None:
    """The name taken apart; None where it is not one of a triggered policy."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Variant(
        kind=re.sub(r"-k\d+|@.*", "", name),
        stem=found["stem"],
        metric=found["metric"],
        ratio=int(found["percent"]) / 100 if found["percent"] else None,
        k=int(found["k"]) if found["k"] else None,
        weight=float(found["weight"]) if found["weight"] else None,
        budget=float(found["budget"]) if found["budget"] else None,
    )
