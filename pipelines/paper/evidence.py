"""What the runs of a job say, read from the disk: any figure by metric, task and policy, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from pipelines.analyse.decisions import tables as decision_tables
from pipelines.analyse.kept import AUDITED
from pipelines.analyse.shard_tables import Steps, read_steps
from pipelines.analyse.sufficiency import hit_at, top_steps
from pipelines.data.layout import COLLECTED, RESULTS
from pipelines.data.shards import read_shards
from pipelines.paper.published import AND, MATHS_AVERAGE, VERSUS, policies_in
from pipelines.paper.runs import Run, Runs
from pipelines.results.averages import maths_averages
from pipelines.results.summary import Summary, read_results, summarise
from s2t_models.errors import UserError, one_line
from s2t_models.policies.variants import variant

#: The collections of the tasks' own prompts.
STATES = "states"
#: The metrics that are taken from them -> K.
HITS = {"Hit@1": 1, "Hit@8": 8}


@dataclass(frozen=True)
class Value:
    """A figure in the paper's units (percentages are of a hundred), with its 95% interval and the problems behind it
    where it has them."""

    value: float
    low: float | None = None
    high: float | None = None
    items: int | None = None


@dataclass(frozen=True)
class Results:
    """The answers of one benchmark, with the teacher's view where it was audited."""

    frame: pd.DataFrame
    summaries: Mapping[tuple[str, str], Summary]
    decisions: Mapping[tuple[str, str], Mapping[str, Any]]
    agreement: Mapping[tuple[str, str, str], Mapping[str, Any]]
    first_wrong: Mapping[tuple[str, str], Mapping[str, Any]]


class Evidence:
    """The runs of a job as they are on the disk when it is made."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.tasks = runs.given.tasks
        self.results = cache(self._results)
        self.steps = cache(self._steps)
        self.left_out = cache(runs.left_out)

    def rows(self, part: str, task: str, policy: str) -> pd.DataFrame:
        """The answers of a policy on a task in a benchmark; none where it was not asked."""
        results = self.results(part)
        if results is None:
            return pd.DataFrame()
        return results.frame[(results.frame["task"] == task) & (results.frame["policy"] == policy)]

    def tasks_of(self, part: str) -> tuple[str, ...]:
        """The tasks of a benchmark, or of a collection of tasks."""
        matrix = self.runs.given.matrix
        found = matrix.benchmarks.get(part) or matrix.collections.get(part)
        return found.run_on(self.tasks) if found else ()

    def knows(self, part: str) -> bool:
        """Whether the matrix has this benchmark, or collection of tasks."""
        matrix = self.runs.given.matrix
        return part in (matrix.collections if part == STATES else matrix.benchmarks)

    def measure(self, metric: str, task: str, policy: str, reads: Iterable[str]) -> Value | str:
        """The figure from the first of the runs `reads` that has it; else why there is none, in one line."""
        reads = tuple(reads)
        reasons: list[tuple[str, bool]] = []
        for part in reads:
            found = self._measured(part, metric, task, policy)
            if isinstance(found, Value) and not np.isnan(found.value):
                return found
            reasons.append(
                (found if isinstance(found, str) else f"nothing to take {metric} of", self._names(part, policy))
            )
        reasons.sort(key=lambda reason: not reason[1])  # that of a run which was to give it comes first
        default = f"the matrix names no {policy} in {', '.join(reads)}"
        return next((reason for reason, _ in reasons if reason), default)

    def _measured(self, part: str, metric: str, task: str, policy: str) -> Value | str:
        of_states = metric in HITS
        if of_states or part == STATES:
            return self._hit(metric, task, policy) if of_states and part == STATES else ""
        if VERSUS in policy or AND in policy:
            of_each = metric if VERSUS in policy else "accuracy"
            found = [self._measured(part, of_each, task, one) for one in policies_in(policy)]
            values = [one.value for one in found if isinstance(one, Value)]
            if len(values) < len(found):
                return next((one for one in found if isinstance(one, str) and one), "")
            if VERSUS in policy:
                return Value(100 * (values[0] / values[1] - 1) if values[1] else np.nan)
            return Value(float(np.std(values, ddof=1) if metric == "deviation" else np.mean(values)))
        results = self.results(part)
        if results is None:
            return self.why_no_run(part)
        if task == MATHS_AVERAGE:
            averages = {one.policy: one for one in maths_averages(list(results.summaries.values()))}
            if policy not in averages:
                return self._why_left_out(part, task, policy)
            one = averages[policy]
            return Value(100 * one.accuracy, 100 * one.low, 100 * one.high)
        if (task, policy) not in results.summaries:
            return self._why_left_out(part, task, policy)
        return MEASURES[metric](results, (task, policy))

    def _hit(self, metric: str, task: str, policy: str) -> Value | str:
        """Hit@k on the SLM's own greedy rollouts of the task's problems, at the steps that the policy's trigger would
        pick."""
        steps = self.steps(task)
        if steps is None:
            return self.why_no_run(STATES, task)
        recipe, found = self.runs.given.recipe, variant(policy)
        trigger = (found and found.metric) or recipe.trigger.metric
        tau = (found and found.budget) or recipe.budget
        random_T = np.random.default_rng(0).random(len(steps.kl_T))
        value_T = {"kl": steps.kl_T, "entropy": steps.entropy_T, "random": random_T}[trigger]
        chosen_T = top_steps(value_T, tau)
        return Value(100 * hit_at(steps.rank_T[chosen_T], (HITS[metric],))[HITS[metric]])

    def _results(self, part: str) -> Results | None:
        run = Run("benchmark", part)
        folder = self.runs.folder(run)
        try:
            if part not in self.runs.given.matrix.benchmarks or not self.runs.has_answers(part):
                return None
        except UserError as error:
            self.runs.open.setdefault(run.name, one_line(error))
            return None
        audited = self.runs.is_done(Run("audit", part))
        frame, metadata = read_results(folder / (AUDITED if audited else RESULTS))
        summaries = {(one.task, one.policy): one for one in summarise(frame)}
        tables = decision_tables([(frame, metadata)])
        return Results(
            frame,
            summaries,
            {(row["task"], row["policy"]): row for row in tables["decisions"]},
            {(row["task"], row["policy"], row["group"]): row for row in tables["agreement"]},
            {(row["task"], row["policy"]): row for row in tables["first_wrong"]},
        )

    def _steps(self, task: str) -> Steps | None:
        folder = self.runs.folder(Run("collection", STATES, task))
        if STATES not in self.runs.given.matrix.collections or not (folder / COLLECTED).is_file():
            return None
        return read_steps(*read_shards(folder))

    def why_no_run(self, part: str, task: str | None = None) -> str:
        """Why there are no results of a benchmark, or of the collection of a task's states."""
        kind = "collection" if part == STATES else "benchmark"
        if not self.knows(part):
            return f"the matrix has no {kind} {part}"
        run = Run(kind, part, task)  # type: ignore[arg-type]
        return self.runs.open.get(run.name) or f"the {run.name} has not run"

    def _names(self, part: str, policy: str) -> bool:
        """Whether a benchmark of the matrix asks the policy, or all of those that are compared."""
        benchmark = self.runs.given.matrix.benchmarks.get(part)
        return benchmark is not None and set(policies_in(policy)) <= set(benchmark.policies)

    def _why_left_out(self, part: str, task: str, policy: str) -> str:
        if not self._names(part, policy):
            return ""
        return self.left_out(part).get(policy) or f"{policy} was not asked about {task}"


Measure = Callable[[Results, tuple[str, str]], Value | str]
UNAUDITED = "the teacher was not asked about these answers"


def _accuracy(results: Results, key: tuple[str, str]) -> Value:
    one = results.summaries[key]
    return Value(100 * one.accuracy, 100 * one.low, 100 * one.high, one.items)


def _deviation(results: Results, key: tuple[str, str]) -> Value | str:
    one = results.summaries[key]
    if one.deviation is None:
        return "one seed has no deviation; give the benchmark several"
    return Value(100 * one.deviation, items=one.items)


def _summary(name: str, scale: float = 1.0) -> Measure:
    def of(results: Results, key: tuple[str, str]) -> Value:
        return Value(scale * getattr(results.summaries[key], name), items=results.summaries[key].items)

    return of


def _decided(name: str, scale: float = 1.0, by_teacher: bool = True) -> Measure:
    def of(results: Results, key: tuple[str, str]) -> Value | str:
        row = results.decisions.get(key)
        if row is None:
            return f"{key[1]} decided nothing on {key[0]}"
        if by_teacher and not row["with_teacher"]:
            return UNAUDITED
        return Value(scale * row[name])

    return of


def _group(name: str, of_value: str = "accuracy", scale: float = 100.0) -> Measure:
    def of(results: Results, key: tuple[str, str]) -> Value | str:
        row = results.agreement.get((*key, name))
        if row is None:
            audited = any(other[:2] == key for other in results.agreement)
            return f"no answer is in the {name} group" if audited else UNAUDITED
        if of_value == "accuracy":
            return Value(scale * row["accuracy"], scale * row["low"], scale * row["high"], row["answers"])
        return Value(row[of_value])

    return of


#: Metric -> how it is taken from a benchmark.
MEASURES: dict[str, Measure] = {
    **dict.fromkeys(("accuracy", "S2T-Local", "FT Greedy", "SLM Greedy", "S2T"), _accuracy),
    "deviation": _deviation,
    "rating": _summary("score", 10.0),
    "tokens": _summary("tokens"),
    "seconds": _summary("seconds"),
    "Agree@1": _decided("agree_at_1", 100.0),
    "Kendall": _decided("kendall"),
    "Spearman": _decided("spearman"),
    "SLM on sel.": _decided("slm_on_selected", 100.0, by_teacher=False),
    "LLM on sel.": _decided("teacher_on_selected", 100.0),
    "Score on sel.": _decided("score_on_selected", 100.0, by_teacher=False),
    "LLM entropy": _decided("teacher_entropy"),
    "Score entropy": _decided("score_entropy", by_teacher=False),
    "Avg. |C|": _decided("candidates", by_teacher=False),
    "Hit@C": _decided("hit", 100.0),
    "agree accuracy": _group("agree"),
    "disagree accuracy": _group("disagree"),
    "rho": _group("disagree", "rho"),
}
