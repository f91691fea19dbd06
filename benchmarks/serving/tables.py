"""Percentiles and plain tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def percentiles(values: Iterable[float | None], shares: Sequence[float] = (50, 95, 99)) -> list[float]:
    """Those of the values that are there, NaN where there are none."""
    known = [value for value in values if value is not None]
    return [float(value) for value in np.percentile(known, shares)] if known else [float("nan")] * len(shares)


def together(values: Sequence[float], scale: float, digits: int) -> str:
    """Percentiles as one cell, each times `scale`; "-" where there are none."""
    return "-" if any(np.isnan(values)) else " / ".join(f"{value * scale:.{digits}f}" for value in values)


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        )
    print(end="", flush=True)
