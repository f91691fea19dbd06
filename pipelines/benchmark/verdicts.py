"""From answers to graded rows (schema RESULT): each a pure function of its answer, and of the judge's ratings
where a task has one.

What a judge said is kept beside the answers, so that it is not asked again either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines.benchmark.answer_log import Answer, read_answers
from pipelines.benchmark.questions import Row
from pipelines.grading.judge import Ask
from pipelines.runtime.records import RecordLog
from pipelines.tasks import Graded
from s2t_models.storage import Location


def remembered(ask: Ask, name: str, folder: Location) -> Ask:
    """`ask` with a memory: what the judge known as `name` answered once is read from `folder` from then on."""
    known = read_answers(folder)
    log: RecordLog | None = None

    def ask_once(chat: list[dict[str, str]]) -> str:
        nonlocal log
        key = hashlib.sha256(json.dumps([name, chat]).encode()).hexdigest()
        if key not in known:
            known[key] = {"key": key, "text": ask(chat)}
            log = log or RecordLog(folder)
            log.append(known[key])
        return str(known[key]["text"])

    return ask_once


def grade(
    rows: Sequence[Row],
    answers: Mapping[str, Answer],
    unanswered: Mapping[str, str],
    ask_judge: Ask | None,
    concurrency: int = 2,
) -> list[dict[str, Any]]:
    """The graded rows (schema RESULT), in the order of `rows`. `unanswered` holds key -> reason for rows
    without an answer; `ask_judge` may be None where no row has a judge; `concurrency` is how many rows the judge is
    asked about at once."""

    def one(row: Row) -> dict[str, Any]:
        return graded_row(row, answers.get(row.key), unanswered.get(row.key), ask_judge)

    # Graders wait for worker processes of their own, a judge for its endpoint: threads are enough to keep those busy.
    with ThreadPoolExecutor(2) as graders, ThreadPoolExecutor(concurrency) as judges:
        pending = [(judges if row.task.judged else graders).submit(one, row) for row in rows]
        return [graded.result() for graded in pending]


def graded_row(row: Row, answer: Answer | None, reason: str | None, ask_judge: Ask | None) -> dict[str, Any]:
    """One graded row. Without an answer it is errored for `reason`. What is graded is what was served: maj@n has voted
    already."""
    answer = answer or {"outputs": [], "finish": None, "tokens": 0, "s2t": {}, "seconds": None, "error": reason}
    cost, outputs = answer["s2t"], answer["outputs"]
    finish = "length" if answer["finish"] == "length" else "end"
    if answer["error"] or not outputs:
        graded = Graded("errored", None, 0.0, answer["error"] or "no answer")
    else:
        graded = row.task.grade(outputs, row.item, finish, ask_judge)
    gold = row.item.answer
    return {
        "key": row.key,
        "task": row.task.name,
        "item": row.item.uid,
        "category": row.item.metadata.get(row.task.stratify) if row.task.stratify else None,
        "policy": row.policy,
        "kind": row.settings.get("kind") or row.policy,
        "k": row.settings.get("k"),
        "budget": row.settings.get("budget"),
        "seed": row.seed,
        "repeat": row.repeat,
        "request_seed": row.request_seed,
        "output": outputs[-1] if outputs else None,
        "output_ids": cost.get("ids"),
        "turns": outputs if row.turns else None,
        "samples": cost.get("samples") or [],
        "extracted": graded.extracted,
        "answer": gold if isinstance(gold, str) else json.dumps(gold),
        "verdict": graded.verdict,
        "score": graded.score,
        "error": graded.detail if graded.verdict == "errored" else None,
        "finish": finish,
        "limit": row.task.max_new_tokens,
        "shortened": bool(answer.get("shortened")),
        "tokens": answer["tokens"],
        "usage": json.dumps(cost.get("usage", {})),
        "decisions": json.dumps(cost.get("decisions", [])),
        "models": json.dumps(cost.get("models", {})),
        "seconds": cost.get("seconds", answer["seconds"]),
        "client_seconds": answer["seconds"],
    }
