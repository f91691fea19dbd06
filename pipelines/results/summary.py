"""A results file and what it says: summaries, comparisons, flips, tables, and the loop's `summary.json`.

One row an answer (schema RESULT). Everything here is computed from the rows alone, so a results file can be
read again anywhere. Nothing here knows how the rows came about.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.schema import RESULT, VERSION
from pipelines.data.text import encodable
from pipelines.results.statistics import Paired, accuracy, over_seeds, paired
from pipelines.tasks import VERDICTS
from s2t_models.errors import UserError, one_line
from s2t_models.storage import Location, location, whole

PAIR = ["item", "seed", "repeat"]
#: The metadata that says what was asked of the teacher to train the model of each policy (JSON).
TRAINING = "s2t.training"


class ResultsError(UserError):
    """A results file that cannot be used; the message is one line."""


def write_results(path: Location, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, str]) -> None:
    """Write the rows whole or not at all, as Parquet with the job's metadata."""
    schema = RESULT.with_metadata({"s2t.results": VERSION, **metadata})
    table = pa.Table.from_pylist(
        [{key: _encodable(value) for key, value in row.items()} for row in rows], schema=schema
    )
    with whole(path) as part:
        pq.write_table(table, part)


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    return [_encodable(item) for item in value] if isinstance(value, list) else value


def read_results(path: str | Location) -> tuple[pd.DataFrame, dict[str, str]]:
    """The rows and the metadata of a results file. Raises ResultsError where it is none."""
    path = location(path)
    try:
        table = pq.read_table(path if isinstance(path, Path) else io.BytesIO(path.read_bytes()))
    except (pa.ArrowException, OSError) as error:
        raise ResultsError(f"{path}: not a results file: {one_line(error)}") from None
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("s2t.results") != VERSION:
        raise ResultsError(f"{path}: not a results file of version {VERSION}; run the benchmark again")
    return table.to_pandas(), metadata


@dataclass(frozen=True)
class Summary:
    """A policy on a task; `k` and `budget` are None where they mean nothing to it. Accuracies are fractions; costs are
    means over the answers that were given: tokens of output, teacher tokens read (prefill) and written (decode),
    forwards of all models, triggered steps, and seconds on the server under the job's load. `shortened` answers had
    less room than their limit. The tokens that the teacher read and wrote to train the policy's model are None where
    nothing was trained, or no record says it."""

    task: str
    policy: str
    kind: str
    k: int | None
    budget: float | None
    accuracy: float
    low: float
    high: float
    deviation: float | None
    items: int
    rows: int
    correct: int
    wrong: int
    truncated: int
    errored: int
    shortened: int
    score: float
    score_deviation: float | None
    tokens: float
    teacher_prefill: float
    teacher_decode: float
    forwards: float
    decisions: float
    seconds: float
    training_read: int | None = None
    training_written: int | None = None


def summarise(frame: pd.DataFrame, metadata: Mapping[str, str] | None = None) -> list[Summary]:
    """One summary a (task, policy), in the order of the rows; with the file's `metadata` also what training took."""
    training = json.loads((metadata or {}).get(TRAINING, "{}"))
    return [
        _summary(str(task), str(policy), rows, training.get(policy, {}))
        for (task, policy), rows in frame.groupby(["task", "policy"], sort=False)
    ]


def _summary(task: str, policy: str, rows: pd.DataFrame, training: Mapping[str, int]) -> Summary:
    figures = accuracy(rows["item"].tolist(), (rows["verdict"] == "correct").tolist(), rows["seed"].tolist())
    counts = rows["verdict"].value_counts()
    answered = rows[rows["error"].isna()]
    costs = [_costs(usage) for usage in answered["usage"]]
    score, spread = over_seeds(rows["seed"].tolist(), rows["score"].fillna(0.0).tolist())

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if len(values) else 0.0

    return Summary(
        task=task,
        policy=policy,
        kind=str(rows["kind"].iloc[0]),
        k=known(rows["k"].iloc[0], int),
        budget=known(rows["budget"].iloc[0], float),
        accuracy=figures.accuracy,
        low=figures.low,
        high=figures.high,
        deviation=figures.deviation,
        items=figures.items,
        rows=figures.rows,
        **{verdict: int(counts.get(verdict, 0)) for verdict in VERDICTS},
        shortened=int(rows["shortened"].sum()),
        score=score,
        score_deviation=spread,
        tokens=mean(answered["tokens"].tolist()),
        teacher_prefill=mean([cost["teacher_prefill"] for cost in costs]),
        teacher_decode=mean([cost["teacher_decode"] for cost in costs]),
        forwards=mean([cost["forwards"] for cost in costs]),
        decisions=mean([len(json.loads(decisions)) for decisions in answered["decisions"]]),
        seconds=mean(answered["seconds"].tolist()),
        training_read=training.get("read"),
        training_written=training.get("written"),
    )


def known(value: Any, kind: type) -> Any:
    """A column's value, or None: a null comes as NaN."""
    return None if pd.isna(value) else kind(value)


def _costs(usage: str) -> dict[str, int]:
    engines = json.loads(usage)
    teacher = engines.get("teacher", {})
    return {
        "teacher_prefill": teacher.get("prefill", 0),
        "teacher_decode": teacher.get("decode", 0),
        "forwards": sum(cost.get("forwards", 0) for cost in engines.values()),
    }


def compare(frame: pd.DataFrame, task: str, a: str, b: str) -> tuple[Paired, pd.DataFrame]:
    """Policy a minus policy b on the questions both were asked with the same seed, and the flipped rows:
    item, seed, repeat, and which policy got it right. Raises ResultsError where they share none."""
    rows = frame[frame["task"] == task]
    sides = [rows[rows["policy"] == policy].set_index(PAIR)["verdict"] == "correct" for policy in (a, b)]
    both = pd.concat(sides, axis=1, join="inner", keys=["a", "b"]).reset_index()
    if both.empty:
        raise ResultsError(f"{task}: {a} and {b} were not asked the same questions")
    result = paired(both["item"].tolist(), both["a"].tolist(), both["b"].tolist())
    flips = both.loc[[*result.gained, *result.lost], PAIR].assign(
        right=[a] * len(result.gained) + [b] * len(result.lost),
        wrong=[b] * len(result.gained) + [a] * len(result.lost),
    )
    return result, flips


def comparisons(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Every two policies of each task, the later minus the earlier: rows of figures, and all flips in one
    table."""
    rows, flips = [], []
    for task, part in frame.groupby("task", sort=False):
        policies = list(part["policy"].unique())
        for place, b in enumerate(policies):
            for a in policies[place + 1 :]:
                result, flipped = compare(part, str(task), a, b)
                rows.append(
                    {
                        "task": task,
                        "a": a,
                        "b": b,
                        "difference": result.difference,
                        "low": result.low,
                        "high": result.high,
                        "p": result.p,
                        "items": result.items,
                        "gained": len(result.gained),
                        "lost": len(result.lost),
                    }
                )
                flips.append(flipped.assign(task=task, a=a, b=b))
    return rows, pd.concat(flips, ignore_index=True) if flips else pd.DataFrame()


def markdown(summaries: Sequence[Summary], pairs: Sequence[Mapping[str, Any]]) -> str:
    """The tables of a job as Markdown that reads well as plain text: policies with intervals and costs (the teacher's
    tokens an answer, and those it read and wrote for a training), then each policy against the first of its task."""
    parts = []
    for task in dict.fromkeys(summary.task for summary in summaries):
        own = [summary for summary in summaries if summary.task == task]
        first = own[0]
        header = (
            "policy",
            "accuracy %",
            "95% interval",
            "correct",
            "wrong",
            "truncated",
            "errored",
            "tokens",
            "teacher tokens",
            "training read",
            "training wrote",
            "forwards",
            "seconds",
        )
        body = [_table_row(summary) for summary in own]
        seeds = f", {first.rows // first.items} answers each" if first.rows > first.items else ""
        parts.append(f"### {task}: {first.items} items{seeds}\n\n{markdown_table(header, body)}")
        cut = [f"{summary.policy} {summary.shortened} of {summary.rows}" for summary in own if summary.shortened]
        if cut:
            parts.append(f"Answers that had less room than their limit: {', '.join(cut)}.")
        against = [pair for pair in pairs if pair["task"] == task and pair["b"] == first.policy]
        if against:
            columns = (f"against {first.policy}", "difference", "95% interval", "p", "gained", "lost")
            lines = [
                (
                    pair["a"],
                    f"{100 * pair['difference']:+.1f}",
                    f"[{100 * pair['low']:+.1f}, {100 * pair['high']:+.1f}]",
                    f"{pair['p']:.2g}",
                    str(pair["gained"]),
                    str(pair["lost"]),
                )
                for pair in against
            ]
            parts.append(markdown_table(columns, lines))
    return "\n\n".join(parts) + "\n"


def _table_row(summary: Summary) -> tuple[str, ...]:
    spread = "" if summary.deviation is None else f" ± {100 * summary.deviation:.1f}"
    counts = (str(getattr(summary, verdict)) for verdict in VERDICTS)
    return (
        summary.policy,
        f"{100 * summary.accuracy:.1f}{spread}",
        f"[{100 * summary.low:.1f}, {100 * summary.high:.1f}]",
        *counts,
        f"{summary.tokens:.1f}",
        f"{summary.teacher_prefill + summary.teacher_decode:.1f}",
        *("" if tokens is None else f"{tokens:,}" for tokens in (summary.training_read, summary.training_written)),
        f"{summary.forwards:.1f}",
        f"{summary.seconds:.2f}",
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if i == 0 else "-" * (width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


#: The names of the summary where they are not the names the policies are served under.
SUMMARY_NAMES = {"s2t-local-w0": "s2t-local (w=0)"}


def loop_summary(
    frame: pd.DataFrame, hits: Mapping[int, float], budget: float, splits: Mapping[str, str]
) -> dict[str, Any]:
    """The figures of one task as `summary.json` holds them: `policies`, `paired` (both directions), `hit` at
    the top 1% steps, `budget`, `seeds` and the hashes of the `splits`. Accuracies and differences are
    fractions."""
    (task,) = frame["task"].unique()
    summaries = summarise(frame)
    pairs = {}
    for a, b in permutations([summary.policy for summary in summaries], 2):
        result, _ = compare(frame, task, a, b)
        pairs[f"{SUMMARY_NAMES.get(a, a)}-{SUMMARY_NAMES.get(b, b)}"] = {
            "difference": result.difference,
            "interval": [result.low, result.high],
            "p": result.p,
        }
    return {
        "policies": {
            SUMMARY_NAMES.get(summary.policy, summary.policy): {
                "accuracy": summary.accuracy,
                "interval": [summary.low, summary.high],
                "items": summary.items,
                "tokens": summary.tokens,
                "seconds": summary.seconds,
            }
            for summary in summaries
        },
        "paired": pairs,
        "hit": {str(k): hit for k, hit in hits.items()},
        "budget": budget,
        "seeds": sorted(int(seed) for seed in frame["seed"].unique()),
        "splits": dict(splits),
    }


def as_rows(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    return [asdict(summary) for summary in summaries]
