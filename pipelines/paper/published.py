"""The paper's own figures (`paper_tables.csv`), by table.

One row a figure: the table, the SLM, the benchmark and its task here, the method as the paper names it and the policy
that it is here, the metric and its value. Percentages are as printed. A row without a value is one whose figure, or
whose column, the text at hand has lost: it says what the table measures.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

#: What stands between two policies: the first relative to the second; all of them, such as trainings with other seeds.
VERSUS, AND = " vs ", " and "
#: The task of Table 1's Math Avg.
MATHS_AVERAGE = "maths average"


@dataclass(frozen=True)
class Published:
    """One row of the file; `value` None where it is lost."""

    table: str
    slm: str
    benchmark: str
    task: str
    method: str
    policy: str
    metric: str
    value: float | None


def policies_in(policy: str) -> tuple[str, ...]:
    """The policies that a row's `policy` names."""
    return tuple(policy.split(VERSUS if VERSUS in policy else AND))


@cache
def published(table: str) -> tuple[Published, ...]:
    """The rows of a table, in its order."""
    text = (files("pipelines.paper") / "paper_tables.csv").read_text()
    rows = (row for row in csv.DictReader(io.StringIO(text)) if row["table"] == table)
    return tuple(Published(**{**row, "value": float(row["value"]) if row["value"] else None}) for row in rows)  # type: ignore[arg-type]
