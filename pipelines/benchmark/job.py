"""Benchmark: policies x tasks x seeds over a served endpoint, graded, with intervals and paired differences.

    python -m pipelines.benchmark --recipe cluster/recipes/embedded.yaml --output runs/benchmark
    python -m pipelines.benchmark --recipe FILE --output DIR --task gsm8k,math500 --data DIR \\
        --policies greedy,maj@8,s2t,s2t@0.05 --seeds 0,1,2 --items 200 --endpoint http://127.0.0.1:8000

Without --endpoint the recipe is served for the length of the job. The job can be killed at any moment: the
same command asks only what was not answered yet, and ends with the same results. The output folder, on a file system
that all nodes share or in an object store, holds

    answers/*.jsonl     every answer as it came, by key (`answer_log.py`)
    results.parquet     one graded row an answer (schema RESULT), with the job's recipe and item hashes
    tables.md, figures  what the rows say (`report.py`); MLflow gets the same
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import serve

from pipelines.benchmark.answer_log import read_answers
from pipelines.benchmark.asking import TIMEOUT_S, ask
from pipelines.benchmark.endpoint import served_models
from pipelines.benchmark.questions import Row, check_splits, load_items, plan, tight_limits
from pipelines.benchmark.training import teacher_tokens
from pipelines.benchmark.verdicts import grade, remembered
from pipelines.data.layout import ANSWERS, JUDGEMENTS, RESULTS
from pipelines.grading.judge import Ask, endpoint
from pipelines.results import report
from pipelines.results.summary import TRAINING, read_results, write_results
from pipelines.runtime import tracking
from pipelines.runtime.progress import Progress
from pipelines.runtime.records import NewLines
from pipelines.tasks import Item, Task
from s2t_models.errors import NothingDone, UserError, one_line
from s2t_models.hosting import Hosting, host, trained_folders
from s2t_models.locks import locked
from s2t_models.node_cache import fetched
from s2t_models.policies import PolicyError, lacking, policy
from s2t_models.recipe import Recipe
from s2t_models.storage import Location, location
from serving import app, cluster
from serving.keys import new_key
from serving.registry import weights_of
from serving.written import new_board, total

#: How many tokens the engines have written so far; None where that is not known.
Written = Callable[[], int] | None
#: The key of an endpoint that is given, and of a judge.
KEY_VARIABLE = "OPENAI_API_KEY"


class BenchmarkError(UserError):
    """A job that cannot begin or go on; the message is one line."""


@dataclass(frozen=True)
class AskedEndpoint:
    """The endpoint that a job asks, with the key it has there."""

    url: str
    api_key: str
    written: Written = None


@dataclass(frozen=True)
class Options:
    """What a job takes beside its recipe. `endpoint` None: serve the recipe; `judge` None: the endpoint's own
    `judge_model`. `tracking` is the MLflow store. `unsandboxed` lets model-written code run where the system
    isolates none."""

    data: Path | None = None
    endpoint: str | None = None
    tracking: str | None = None
    repeats: int = 1
    judge: str | None = None
    judge_model: str = "llm"
    unsandboxed: bool = False


def benchmark(recipe: Recipe, output: Location, options: Options) -> tuple[str, str]:
    """Run or finish the job in `output`; returns its tables as Markdown, and where MLflow shows its runs.

    Raises UserError: what the recipe names is missing or does not fit together, a test row was trained on, the cluster
    is too small, the endpoint stopped answering, or (NothingDone) every row errored."""
    with locked(output):
        chosen = [(task.prepared(options.unsandboxed), items) for task, items in load_items(recipe, options.data)]
        splits = check_splits(recipe, chosen, options.data)
        # Before the first question: a store that is not there must not cost them.
        kept = f"the answers in {output} are kept, and the same command logs what comes of them"
        tracking.use_store_for((output / ANSWERS).is_dir(), kept, options.tracking)
        with _endpoint(recipe, chosen, options, output) as asked:
            # In the cache keys too, so that no answer outlives a change of weights, thresholds or settings.
            settings = served_models(asked.url, recipe.benchmark.policies, asked.api_key)
            training = teacher_tokens(recipe, settings)
            rows = plan(recipe, chosen, settings, options.repeats)
            for line in tight_limits(rows):
                print(f"benchmark: {line}", file=sys.stderr)
            unanswered = _ask_missing(rows, asked, output / ANSWERS, recipe.benchmark.concurrency)
            answers = read_answers(output / ANSWERS)
            judged = any(task.judged for task, _ in chosen)
            judge = _judge(options, asked, output) if judged else None
            graded = grade(rows, answers, unanswered, judge, recipe.benchmark.concurrency)
        metadata = {
            "s2t.recipe": recipe.model_dump_json(),
            "s2t.settings": json.dumps(settings, sort_keys=True, default=str),
            "s2t.splits": json.dumps(splits),
            TRAINING: json.dumps({name: asked.model_dump() for name, asked in training.items()}),
        }
        write_results(output / RESULTS, graded, metadata)
        tables, seen = report.report(output / RESULTS, output, options.tracking)
    _say_what_errored(graded, len(unanswered), output)
    if shortened := sum(row["shortened"] for row in graded):
        print(
            f"benchmark: {shortened} of {len(graded)} answers had less room than their limit, for the context holds no "
            "prompt beside it; set a longer slm.context and teacher.context, or a smaller benchmark.max_new_tokens",
            file=sys.stderr,
        )
    return tables, seen


def is_done(recipe: Recipe, output: Location) -> bool:
    """Whether `output` holds the results of this job, whole and of the weights that the recipe's folders hold now."""
    if not (output / RESULTS).is_file():
        return False
    frame, metadata = read_results(output / RESULTS)
    if (frame["verdict"] == "errored").any() or metadata["s2t.recipe"] != recipe.model_dump_json():
        return False
    answered = {name: digest for models in frame["models"].unique() for name, digest in json.loads(models).items()}
    return all(
        answered[name] == weights_of(fetched(location(folder)), recipe)
        for name, folder in trained_folders(recipe).items()
        if name in answered
    )


def _say_what_errored(graded: Sequence[Mapping[str, Any]], unanswered: int, output: Location) -> None:
    """One line on stderr where rows errored, with the first reason. Raises NothingDone with that line where all of them
    did."""
    reasons = [row["error"] for row in graded if row["verdict"] == "errored"]
    if not reasons:
        return
    line = f"{len(reasons)} of {len(graded)} rows errored (the first: {one_line(reasons[0] or 'no reason')})"
    if unanswered:
        line += "; the same command asks again what got no answer"
    if unanswered < len(reasons):
        line += f"; refusals are kept in {output / ANSWERS}, delete it to ask anew"
    if len(reasons) == len(graded):
        raise NothingDone(line)
    print(f"benchmark: {line}", file=sys.stderr)


def _engines(hosting: Hosting, names: Sequence[str]) -> set[str]:
    """The engines that the policies call. Raises PolicyError where there is no such policy, or an engine cannot serve
    it."""
    policies = [policy(name, hosting) for name in names]
    if reason := next((reason for wanted in policies if (reason := lacking(wanted, hosting))), None):
        raise PolicyError(reason)
    return {engine for wanted in policies for engine in wanted.needs}


def _judge(options: Options, asked: AskedEndpoint, output: Location) -> Ask:
    """The judge: another endpoint, or a model of this one; what it said is kept in the output folder."""
    # Another judge, or the same one with other weights, is asked anew.
    identity = options.judge or json.dumps(
        served_models(asked.url, [options.judge_model], asked.api_key), sort_keys=True
    )
    key = os.environ.get(KEY_VARIABLE, "") if options.judge else asked.api_key
    ask = endpoint(options.judge or asked.url, options.judge_model, key)
    return remembered(ask, f"{options.judge_model} {identity}", output / JUDGEMENTS)


def _ask_missing(rows: Sequence[Row], asked: AskedEndpoint, folder: Location, concurrency: int) -> dict[str, str]:
    """Ask what has no answer in `folder` yet; returns key -> reason for what still has none."""
    folder.mkdir(exist_ok=True)
    known = read_answers(folder)
    missing = [question for row in rows if (question := row.question())["key"] not in known]
    if not missing:
        return {}
    kept = _Count(len(rows) - len(missing), NewLines(folder, from_now=True))
    with Progress("benchmark", "answers", len(rows), kept, asked.written):
        return ask(missing, asked.url, folder, concurrency, asked.api_key)


class _Count:
    """How many rows have an answer: those `done` before, and what has been added to a log."""

    def __init__(self, done: int, added: NewLines) -> None:
        self._done, self._added = done, added

    def __call__(self) -> int:
        self._done += self._added.count()
        return self._done


@contextmanager
def _endpoint(
    recipe: Recipe, chosen: list[tuple[Task, list[Item]]], options: Options, output: Location
) -> Iterator[AskedEndpoint]:
    """The endpoint given, or the engines that the job needs served here for as long as it needs them; on a cluster
    either way."""
    if options.endpoint is not None:
        cluster.start()
        yield AskedEndpoint(options.endpoint, os.environ.get(KEY_VARIABLE, ""))
        return
    asks_here = options.judge is None and any(task.judged for task, _ in chosen)
    names = [*recipe.benchmark.policies, *([options.judge_model] if asks_here else [])]
    hosting = _patient(host(recipe))
    hosting = hosting.only(_engines(hosting, names))
    # A name of this job's own: what else the cluster serves is left alone, and what a killed job left is replaced.
    name = f"benchmark-{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:8]}"
    cluster.start(max(cluster.LOCAL_CPUS, app.cpus(hosting)))
    board = new_board()
    keys, key = new_key("benchmark")
    url = app.run_for_job(hosting, name, keys, board, "benchmark")
    try:
        yield AskedEndpoint(url, key, lambda: total(board))
    except BaseException:
        serve.delete(name, _blocking=False)  # not a minute's wait after Ctrl-C
        raise
    serve.delete(name)


def _patient(hosting: Hosting) -> Hosting:
    """With an endpoint that lets wait all that the job asks at once, for as long as the job does: how long it takes is
    what is measured."""
    serving, concurrency = hosting.recipe.serving, hosting.recipe.benchmark.concurrency
    patience = {
        "request_timeout_s": max(serving.request_timeout_s, TIMEOUT_S),
        "max_waiting": max(serving.max_waiting, concurrency),
    }
    serving = serving.model_copy(update=patience)
    return replace(hosting, recipe=hosting.recipe.model_copy(update={"serving": serving}))
