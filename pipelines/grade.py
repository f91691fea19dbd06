"""Grade responses that were recorded elsewhere: `s2t grade TASK RESPONSES.jsonl [--data DIR] [--output FILE]`.

One JSON object a line, with `response` (a text, or a list of texts to vote over; for mt_bench the two turns' answers) and either `id` (a row of
the task) or `answer` (the gold answer). `finish_reason` "length" marks a response that was cut off, `error` one that failed. Every
field is kept; `verdict`, `extracted` and `correct` are added. It asks no model but MT-Bench's judge.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.grading import judge
from pipelines.results.statistics import wilson
from pipelines.tasks import TASKS, VERDICTS, Graded, Item, Task, humaneval, mt_bench, task
from pipelines.tasks.answers import LETTERS, asks_percentage
from s2t_models.errors import UserError

Row = dict[str, Any]
Grader = Callable[[list[str], Item, str], Graded]

WORKERS = 2  # threads; each waits for a math-verify worker or a sandbox


class MalformedLine(ValueError):
    """A line that cannot be graded; the message says why."""


@dataclass(frozen=True)
class Rows:
    """A task, and its rows by uid and by their own identifier (none where no line needs them)."""

    task: Task
    by_id: dict[str, Item]

    @classmethod
    def load(cls, chosen: Task, data: Path | None) -> Rows:
        by_id: dict[str, Item] = {}
        for item in chosen.load(data):
            by_id[item.uid] = item
            by_id[item.uid.split("/", 1)[1]] = item
        return cls(chosen, by_id)

    def find(self, row_id: object) -> Item | None:
        wanted = str(row_id)
        return self.by_id.get(wanted) or self.by_id.get(wanted.removeprefix("HumanEval/"))


def _bare_item(name: str, row: Row) -> Item:
    """An item for a line that carries its own answer. Whether a percentage was asked for is seen from the question where the line has it
    as `question` or `problem`, else from the response's own words."""
    golds = [
        str(gold).rsplit("####", 1)[-1].strip()
        for gold in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])
    ]
    texts = row["response"] if isinstance(row["response"], list) else [row["response"]]
    question = next((row[key] for key in ("question", "problem") if isinstance(row.get(key), str)), None)
    options = row.get("options")
    letters = max({"mmlu_pro": 10, "arc_challenge": 5}.get(name, 13), LETTERS.find(golds[0][:1]) + 1)
    metadata = {
        "question": question or "(not given)",
        "percent_asked": asks_percentage(question) if question else all("percent" in str(text) for text in texts),
        "options": options if isinstance(options, list) and options else [""] * letters,
    }
    return Item(f"{name}/given", [], golds[0] if len(golds) == 1 else golds, metadata)


def _item(row: Row, rows: Rows) -> Item:
    """The row's item. A line's own `answer` is the gold answer, whatever its `id`."""
    if "response" not in row:
        raise MalformedLine("no field 'response'")
    response = row["response"]
    texts = response if isinstance(response, list) else [response]
    if not texts or not all(isinstance(text, str) or text is None for text in texts):
        raise MalformedLine("'response' must be a text or a list of texts")
    known = rows.find(row["id"]) if row.get("id") is not None else None
    if row.get("answer") is None:
        if row.get("id") is None:
            raise MalformedLine("neither 'answer' nor 'id'")
        if known is None:
            raise MalformedLine(f"{rows.task.name} has no row {row['id']!r}")
        return known
    if row["answer"] == []:
        raise MalformedLine("'answer' is an empty list")
    if known is not None and known.answer == row["answer"]:
        return known
    if rows.task.name in ("humaneval", "mt_bench"):
        raise MalformedLine(f"{rows.task.name} rows are graded by 'id'")
    return _bare_item(rows.task.name, row)


def _grade(texts: list[str], item: Item, finish: str, chosen: Task) -> Graded:
    if len(texts) == 1:
        return chosen.grade(texts[0], item, finish)
    if not chosen.votes:
        raise MalformedLine(f"{chosen.name} does not vote: 'response' must be one text")
    return chosen.grade_vote(texts, item, finish)


def grade_row(row: Row, rows: Rows, grader: Grader) -> Row:
    """The row with its verdict. Raises MalformedLine."""
    item = _item(row, rows)
    response = row["response"]
    texts = [text for text in (response if isinstance(response, list) else [response]) if text is not None]
    finish = "length" if row.get("finish_reason", row.get("finish")) == "length" else "end"
    graded = Graded("errored", None, 0.0) if row.get("error") or not texts else grader(texts, item, finish)
    added = {"verdict": graded.verdict, "extracted": graded.extracted, "correct": graded.verdict == "correct"}
    return {**row, **added, **({"score": graded.score} if rows.task.judged else {})}


def parse_lines(path: Path) -> Iterator[tuple[int, Row | MalformedLine]]:
    """Every line that is not blank, with its number."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                yield number, MalformedLine(f"not JSON ({getattr(error, 'msg', 'nested too deeply')})")
                continue
            yield number, row if isinstance(row, dict) else MalformedLine("not a JSON object")


def report(name: str, graded: list[Row]) -> str:
    """Accuracy with its 95% Wilson interval, and what the rows came to."""
    counts = Counter(row["verdict"] for row in graded)
    low, high = wilson(counts["correct"], len(graded))
    accuracy = counts["correct"] / len(graded) if graded else 0.0
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    text = (
        f"{name}: accuracy {100 * accuracy:.2f}% [{100 * low:.2f}, {100 * high:.2f}] on {len(graded)} rows ({verdicts})"
    )
    if graded and "score" in graded[0]:
        text += f"; mean rating {10 * sum(row['score'] for row in graded) / len(graded):.2f}"
    return text


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t grade", description="Grade recorded responses, one JSON object a line.")
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument(
        "responses", metavar="RESPONSES.jsonl", type=Path, help="lines with `response`, and `id` or `answer`"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with the benchmark files, needed for `id` (default: download)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the graded lines go")
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="mt_bench: base of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="mt_bench: the judge's model name there")
    parser.add_argument(
        "--allow-unsandboxed",
        action="store_true",
        help="humaneval: run programs with your own rights where they cannot be isolated",
    )
    return parser.parse_args(argv)


def _grader(options: argparse.Namespace, chosen: Task) -> Grader:
    """Raises ValueError where mt_bench has no judge."""
    if chosen.judged:
        if not (options.judge and options.judge_model):
            raise ValueError("mt_bench is graded by a judge model: name one with --judge URL --judge-model NAME")
        from pipelines.benchmark.endpoint import base_url

        ask = judge.endpoint(base_url(options.judge), options.judge_model, os.environ.get("OPENAI_API_KEY", ""))

        def judged(texts: list[str], item: Item, finish: str) -> Graded:
            if len(texts) != chosen.turns:
                raise MalformedLine(f"'response' must be a list of {chosen.turns} texts, one a turn")
            return mt_bench.judged(texts, item, ask)

        return judged
    graded_by = humaneval.unsandboxed() if chosen.name == "humaneval" and options.allow_unsandboxed else chosen
    return lambda texts, item, finish: _grade(texts, item, finish, graded_by)


def main(argv: list[str] | None = None) -> int:
    """Returns 0; 1 where lines were malformed; 2 where nothing could be graded."""
    options = _arguments(argv)
    malformed = 0
    graded: list[Row] = []
    try:
        chosen = task(options.task)
        grader = _grader(options, chosen)
        numbered = list(parse_lines(options.responses))
        by_id = any(
            isinstance(row, dict) and row.get("id") is not None and row.get("answer") is None for _, row in numbered
        )
        rows = Rows.load(chosen, options.data) if by_id or options.data else Rows(chosen, {})

        def one(row: Row | MalformedLine) -> Row | MalformedLine:
            try:
                return row if isinstance(row, MalformedLine) else grade_row(row, rows, grader)
            except MalformedLine as error:
                return error

        with ThreadPoolExecutor(WORKERS) as pool:
            for (number, _), result in zip(numbered, pool.map(one, (row for _, row in numbered)), strict=True):
                if isinstance(result, MalformedLine):
                    malformed += 1
                    print(f"{options.responses}, line {number}: {result}; the line is left out", file=sys.stderr)
                else:
                    graded.append(result)
        if options.output:
            options.output.write_text("".join(json.dumps(row) + "\n" for row in graded), encoding="utf-8")
    except (ValueError, OSError, UserError) as error:
        print(f"s2t grade: {error}", file=sys.stderr)
        return 2
    print(report(chosen.name, graded))
    return 1 if malformed else 0


if __name__ == "__main__":
    sys.exit(main())
