"""Responses that were recorded elsewhere, one JSON object a line, graded like a benchmark's own.

A line has `response` (a text, or a list of texts: votes, or one a turn) and `id` (a row of the task) or `answer` (the
gold answer), with `question`, `options`, `finish_reason` and `error` where they are known. It comes back whole, with
`verdict`, `extracted` and `correct`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.grading.judge import Ask
from pipelines.results.statistics import wilson
from pipelines.tasks import VERDICTS, Graded, Item, Task, load
from pipelines.tasks.answers import asks_percentage
from s2t_models.answers.choices import LETTERS
from s2t_models.answers.latex_text import is_percent
from s2t_models.errors import UserError
from s2t_models.storage import Location, whole

ResponseLine = dict[str, Any]

WORKERS = 2  # threads; each waits for a math-verify worker, a sandbox or a judge


class MalformedLine(ValueError):
    """A line that cannot be graded; the message says why."""


@dataclass(frozen=True)
class RecordedGrader:
    """A task with its rows by uid and by their own identifier (none where no line needs them), and the judge it may
    need."""

    task: Task
    by_id: dict[str, Item]
    ask: Ask | None = None

    @classmethod
    def load(cls, task: Task, data: Path | None, ask: Ask | None = None) -> RecordedGrader:
        """Raises TaskError where the task's rows cannot be had."""
        by_id: dict[str, Item] = {}
        for item in load(task.name, data)[1]:
            names = (item.uid, item.uid.split("/", 1)[1], item.metadata.get("id"))
            by_id |= {str(name): item for name in names if name is not None}
        return cls(task, by_id, ask)

    def grade(self, line: ResponseLine) -> ResponseLine:
        """The line with its verdict. Raises MalformedLine."""
        item = self._item(line)
        response = line["response"]
        given = response if isinstance(response, list) else [response]
        texts = [text for text in given if text is not None]
        unanswered = len(texts) < len(given) if self.task.turns > 1 else not texts
        finish = "length" if line.get("finish_reason", line.get("finish")) == "length" else "end"
        if line.get("error") or unanswered:
            graded = Graded("errored", None, 0.0, str(line.get("error") or "no response"))
        else:
            graded = self.task.grade(self._served(texts, item), item, finish, self.ask)
        added: ResponseLine = {
            "verdict": graded.verdict,
            "extracted": graded.extracted,
            "correct": graded.verdict == "correct",
        }
        if self.task.judged:
            added["score"] = graded.score
        if graded.verdict == "errored" and not line.get("error"):
            added["error"] = graded.detail
        return line | added

    def _served(self, texts: Sequence[str], item: Item) -> list[str]:
        """What is graded: one text a turn; of several responses to one question the one that wins the vote."""
        if len(texts) == self.task.turns:
            return list(texts)
        if self.task.turns > 1:
            raise MalformedLine(f"'response' must be a list of {self.task.turns} texts, one a turn")
        if not self.task.votes:
            raise MalformedLine(f"{self.task.name} does not vote: 'response' must be one text")
        return [self.task.vote(texts, item)]

    def _item(self, line: ResponseLine) -> Item:
        """The line's item. A line's own `answer` is the gold answer, whatever its `id`."""
        if "response" not in line:
            raise MalformedLine("no field 'response'")
        response, row_id, answer = line["response"], line.get("id"), line.get("answer")
        texts = response if isinstance(response, list) else [response]
        if not texts or not all(isinstance(text, str) or text is None for text in texts):
            raise MalformedLine("'response' must be a text or a list of texts")
        known = self.by_id.get(str(row_id)) if row_id is not None else None
        if answer is None:
            if row_id is None:
                raise MalformedLine("neither 'answer' nor 'id'")
            if known is None:
                raise MalformedLine(f"{self.task.name} has no row {row_id!r}")
            return known
        if answer == []:
            raise MalformedLine("'answer' is an empty list")
        if known is not None and known.answer == answer:
            return known
        if not self.task.votes:
            raise MalformedLine(f"{self.task.name} rows are graded by 'id'")
        return _bare_item(self.task, line)


def _bare_item(task: Task, line: ResponseLine) -> Item:
    """An item for a line that carries its own answer. Whether a percentage was asked for is seen from the question
    where the line has it as `question` or `problem`, else from the gold answer's sign or the response's own words."""
    answers = line["answer"] if isinstance(line["answer"], list) else [line["answer"]]
    golds = [str(gold).rsplit("####", 1)[-1].strip() for gold in answers]
    texts = line["response"] if isinstance(line["response"], list) else [line["response"]]
    question = next((line[key] for key in ("question", "problem") if isinstance(line.get(key), str)), None)
    in_percent = any(map(is_percent, golds)) or all("percent" in str(text) for text in texts)
    metadata: dict[str, Any] = {
        "question": question or "(not given)",
        "percent_asked": asks_percentage(question) if question else in_percent,
    }
    if task.most_options:
        given = line.get("options")
        letters = max(task.most_options, LETTERS.find(golds[0][:1]) + 1)
        metadata["options"] = [str(text) for text in given] if isinstance(given, list) and given else [""] * letters
    return Item(f"{task.name}/given", [], golds[0] if len(golds) == 1 else golds, metadata)


def parse_lines(path: Location) -> Iterator[tuple[int, ResponseLine | MalformedLine]]:
    """Every line that is not blank, with its number. Raises UserError where the file cannot be read."""
    try:
        lines = path.read_bytes().decode("utf-8-sig", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            yield number, MalformedLine(f"not JSON ({getattr(error, 'msg', str(error).split(';')[0])})")
            continue
        yield number, line if isinstance(line, dict) else MalformedLine("not a JSON object")


@dataclass(frozen=True)
class GradedFile:
    """The graded lines in their order, and what is wrong with the others, by line number."""

    lines: list[ResponseLine]
    malformed: dict[int, MalformedLine]

    @property
    def none_graded(self) -> bool:
        """Whether no line has a verdict on its response."""
        return all(line["verdict"] == "errored" for line in self.lines)


def grade_file(path: Location, task: Task, data: Path | None, ask: Ask | None = None) -> GradedFile:
    """Grade the lines of a file; the task's rows are loaded where a line needs them, or `data` is given.

    Raises:
        UserError: the file cannot be read or has no lines, or the task's rows cannot be had.
    """
    numbered = list(parse_lines(path))
    if not numbered:
        raise UserError(f"{path}: there are no lines to grade")
    by_id = any(
        isinstance(line, dict) and line.get("id") is not None and line.get("answer") is None for _, line in numbered
    )
    grader = RecordedGrader.load(task, data, ask) if by_id or data else RecordedGrader(task, {}, ask)

    def one(line: ResponseLine | MalformedLine) -> ResponseLine | MalformedLine:
        try:
            return line if isinstance(line, MalformedLine) else grader.grade(line)
        except MalformedLine as error:
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        results = list(pool.map(one, (line for _, line in numbered)))
    return GradedFile(
        [result for result in results if not isinstance(result, MalformedLine)],
        {
            number: result
            for (number, _), result in zip(numbered, results, strict=True)
            if isinstance(result, MalformedLine)
        },
    )


def write_lines(path: Location, lines: Sequence[ResponseLine]) -> None:
    """One JSON object a line, in ASCII: a lone surrogate is no UTF-8. Raises UserError where the file cannot be
    written."""
    try:
        with whole(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another --output") from None


def report(name: str, lines: Sequence[ResponseLine]) -> str:
    """Accuracy with its 95% Wilson interval, and what the lines came to."""
    counts = Counter(line["verdict"] for line in lines)
    low, high = wilson(counts["correct"], len(lines))
    accuracy = counts["correct"] / len(lines) if lines else 0.0
    verdicts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    text = (
        f"{name}: accuracy {100 * accuracy:.2f}% [{100 * low:.2f}, {100 * high:.2f}] on {len(lines)} rows ({verdicts})"
    )
    if lines and "score" in lines[0]:
        text += f"; mean rating {10 * sum(line['score'] for line in lines) / len(lines):.2f}"
    return text
