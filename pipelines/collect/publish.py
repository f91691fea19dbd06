"""The last step of a collection: from labelled rows in the order they were finished to shards.

Here the whole collection is there, so the top steps by KL are those of the whole (section 4.3), exactly, and not of
each trajectory or of an estimate. Rows go into shards in the order of their prompts, each once: the same recipe gives
the same shards however often the collecting was interrupted.

The rows stay where the files are. Tasks on the cluster read them three times: to survey what is there, to refine the
ranks that thresholds and quantiles are (`ranks`), and to write shards. What the driver keeps is counts, and 8
bytes a row that say where it lies. A small collection is one task, which runs here.

Axes: _S all steps of some rows, _B bin of `ranks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.collect import ranks
from pipelines.collect.schemas import FAILED
from pipelines.data.layout import COLLECTED, SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.seal import Damaged, read_sealed
from pipelines.data.shards import ShardError, questions, shard_name, write_shard
from pipelines.data.sink import DamagedFiles
from s2t_models.calibration import BUDGETS, THRESHOLDS, Calibration
from s2t_models.errors import NothingDone, one_line
from s2t_models.noise import uniforms
from s2t_models.provenance import TeacherTokens
from s2t_models.recipe import Recipe
from s2t_models.storage import DIGESTS, Location, ObjectPath, write_json

HITS = (1, 2, 4, 8)
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
METRICS = {"kl": "kl_T", "entropy": "entropy_T"}
ROWS_A_SHARD = 512
#: Files that one task surveys, and shards that one task writes; and tasks that are under way at once.
FILES_A_TASK, SHARDS_A_TASK, AT_ONCE = 64, 2, 64

Result = TypeVar("Result")


class FailedRows(Exception):
    """Files that hold rows whose calls failed; the message says how many, and the first one's error."""

    def __init__(self, files: Sequence[Location], message: str) -> None:
        super().__init__(message)
        self.files = list(files)


@dataclass
class Survey:
    """What some files hold: each row's place (its number among the prompts, its file's number, its row there), and
    counts; which of them are damaged, and how; and which hold rows whose calls failed."""

    index: np.ndarray
    file: np.ndarray
    row: np.ndarray
    coarse_B: dict[str, np.ndarray]
    steps: int = 0
    agreed: int = 0
    teacher_read: int = 0
    output_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    finish: Counter[str] = field(default_factory=Counter)
    first_error: tuple[int, str] | None = None
    damaged: list[tuple[Location, str]] = field(default_factory=list)
    failed: list[Location] = field(default_factory=list)
    first_failed: tuple[int, str] | None = None

    def add(self, other: Survey) -> None:
        """Count the other's too; places are kept apart by whoever adds."""
        self.coarse_B = {name: counts + other.coarse_B[name] for name, counts in self.coarse_B.items()}
        self.steps += other.steps
        self.agreed += other.agreed
        self.teacher_read += other.teacher_read
        self.output_tokens += other.output_tokens
        self.errors += other.errors
        self.finish += other.finish
        self.damaged += other.damaged
        self.failed += other.failed
        self.first_error = min(filter(None, (self.first_error, other.first_error)), default=None)
        self.first_failed = min(filter(None, (self.first_failed, other.first_failed)), default=None)


@dataclass
class Written:
    """What came of some shards: kept steps, and of the steps at the top 1% by KL how many there are and at how many the
    teacher's token is among the SLM's first k; the sha256 of each file."""

    kept: int = 0
    top: int = 0
    hits: Counter[int] = field(default_factory=Counter)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, other: Written) -> None:
        self.kept += other.kept
        self.top += other.top
        self.hits += other.hits
        self.digests |= other.digests


def publish(
    files: Sequence[Location],
    rows: int,
    output: Location,
    metadata: dict[str, str],
    recipe: Recipe,
    rows_a_shard: int = ROWS_A_SHARD,
    takes_failed: bool = True,
) -> dict[str, Any]:
    """Write `output`'s shards, thresholds and summary from the `rows` rows in `files`; returns the summary.

    The summary appears last, and with it the collection. Raises DamagedFiles, ShardError where a row is missing,
    FailedRows where a row's call failed and it is not `takes_failed`, NothingDone where every row errored.
    """
    survey, file_of, row_of = _survey_all(files, rows)
    if survey.first_failed and not takes_failed:
        first = one_line(survey.first_failed[1])
        raise FailedRows(survey.failed, f"{survey.errors[FAILED]} of {rows} rows failed (the first: {first})")
    if not survey.steps:
        first = survey.first_error[1] if survey.first_error else "no token was written"
        raise NothingDone(f"all {rows} rows errored, and there is nothing to publish (the first: {one_line(first)})")
    values = _values(files, survey, recipe)
    thresholds = {
        name: {tau: values[name][ranks.threshold_rank(survey.steps, tau)] for tau in BUDGETS} for name in METRICS
    }
    least_kl = values["kl"][ranks.threshold_rank(survey.steps, recipe.collect.steps)]

    (output / SHARDS).mkdir(exist_ok=True)
    shards = -(-rows // rows_a_shard)
    written = Written()
    jobs = [range(start, min(start + SHARDS_A_TASK, shards)) for start in range(0, shards, SHARDS_A_TASK)]

    def write(numbers: range) -> tuple[Any, ...]:
        places = slice(numbers[0] * rows_a_shard, (numbers[-1] + 1) * rows_a_shard)
        needed, local = np.unique(file_of[places], return_inverse=True)
        own = [files[number] for number in needed]
        cuts = least_kl, thresholds["kl"][0.01]
        return own, local, row_of[places], numbers, shards, rows_a_shard, output, metadata, recipe, cuts

    for done in _spread(_write_shards, (write(numbers) for numbers in jobs), len(files) <= FILES_A_TASK):
        written.add(done)
    if isinstance(output, ObjectPath):
        write_json(output / SHARDS / DIGESTS, written.digests)
    cost = TeacherTokens.of_collection(recipe.collect.writer, survey.teacher_read, survey.output_tokens)
    summary = {
        "rows": rows,
        "errors": dict(sorted(survey.errors.items())),
        "first_error": survey.first_error[1] if survey.first_error else None,
        "finish": dict(sorted(survey.finish.items())),
        "steps": survey.steps,
        "agreement": survey.agreed / survey.steps,
        "hit": {str(k): written.hits[k] / written.top for k in HITS},
        **{f"{name}_quantiles": _quantiles(values[name], survey.steps) for name in METRICS},
        "teacher_prefill": cost.read,
        "teacher_decode": cost.written,
        "kept_steps": written.kept,
        "least_kl": least_kl,
    }
    calibrated = ([output / SHARDS / shard_name(number, shards) for number in range(shards)], thresholds, survey.steps)
    list(_spread(_write_thresholds, [(*calibrated, metadata, output / THRESHOLDS)], len(files) <= FILES_A_TASK))
    write_json(output / COLLECTED, summary)
    return summary


def _spread(work: Callable[..., Result], jobs: Any, here: bool) -> Iterator[Result]:
    """The results of `work` on each job's arguments, in any order: here where that is little, else as tasks on the
    cluster, AT_ONCE of them at a time."""
    if here:
        yield from (work(*job) for job in jobs)
        return
    import ray

    remote = ray.remote(scheduling_strategy="SPREAD", max_retries=3)(work)
    under_way: list[Any] = []
    for job in jobs:
        if len(under_way) == AT_ONCE:
            done, under_way = ray.wait(under_way)
            yield ray.get(done[0])
        under_way.append(remote.remote(*job))
    while under_way:
        done, under_way = ray.wait(under_way)
        yield ray.get(done[0])


def _survey_all(files: Sequence[Location], rows: int) -> tuple[Survey, np.ndarray, np.ndarray]:
    """What all files hold; and for each row in the order of the prompts, its file and its row there."""
    file_of, row_of = np.full(rows, -1, np.int32), np.zeros(rows, np.int32)
    whole = _nothing()
    jobs = ((files[start : start + FILES_A_TASK], start) for start in range(0, len(files), FILES_A_TASK))
    for part in _spread(_survey, jobs, len(files) <= FILES_A_TASK):
        file_of[part.index], row_of[part.index] = part.file, part.row
        whole.add(part)
    if whole.damaged:
        raise DamagedFiles(whole.damaged)
    missing = np.flatnonzero(file_of < 0)
    if len(missing):
        raise ShardError(
            f"{len(missing)} of {rows} rows are missing, the first that of prompt {missing[0] + 1}; collect again"
        )
    return whole, file_of, row_of


def _nothing() -> Survey:
    empty = np.zeros(0, np.int64)
    return Survey(empty, empty, empty, {name: np.zeros(ranks.BINS, np.int64) for name in METRICS})


def _survey(files: Sequence[Location], first: int) -> Survey:
    """What some files hold; `first` is the number of the first of them."""
    survey, places = _nothing(), []
    for number, path in enumerate(files, first):
        try:
            table = read_sealed(path)
        except Damaged as error:
            survey.damaged.append((path, str(error)))
            continue
        index = table["index"].to_numpy()
        places.append((index, np.full(len(index), number), np.arange(len(index))))
        errors = [(int(at), text) for at, text in zip(index, table["error"].to_pylist(), strict=True) if text]
        failed = [error for error in errors if _kind(error[1]) == FAILED]
        rank_S = _flat(table, "teacher_rank_T")
        survey.add(
            Survey(
                *(np.zeros(0, np.int64),) * 3,
                coarse_B={name: ranks.coarse(_flat(table, column)) for name, column in METRICS.items()},
                steps=len(rank_S),
                agreed=int((rank_S == 0).sum()),
                teacher_read=int(pc.sum(table["teacher_read"]).as_py() or 0),
                output_tokens=len(_flat(table, "output_ids")),
                errors=Counter(_kind(text) for _, text in errors),
                finish=Counter(reason for reason in table["finish"].to_pylist() if reason),
                first_error=min(errors, default=None),
                failed=[path] if failed else [],
                first_failed=min(failed, default=None),
            )
        )
    if places:
        survey.index, survey.file, survey.row = (np.concatenate(column) for column in zip(*places, strict=True))
    return survey


def _kind(error: str) -> str:
    return error.partition(":")[0]


def _values(files: Sequence[Location], survey: Survey, recipe: Recipe) -> dict[str, dict[int, float]]:
    """The values of the ranks that thresholds and quantiles are, by metric and rank."""
    wanted = {ranks.threshold_rank(survey.steps, share) for share in (*BUDGETS, recipe.collect.steps)}
    for share in QUANTILES:
        wanted |= set(ranks.quantile_ranks(survey.steps, share)[:2])
    bins = {name: {ranks.bin_of(survey.coarse_B[name], rank) for rank in wanted} for name in METRICS}
    counted: dict[str, ranks.Fine] = {name: {} for name in METRICS}
    jobs = ((files[start : start + FILES_A_TASK], bins) for start in range(0, len(files), FILES_A_TASK))
    for part in _spread(_refine, jobs, len(files) <= FILES_A_TASK):
        for name, counts in part.items():
            ranks.add(counted[name], counts)
    return {
        name: {rank: ranks.value_of(survey.coarse_B[name], counted[name], rank) for rank in wanted} for name in METRICS
    }


def _refine(files: Sequence[Location], bins: dict[str, set[int]]) -> dict[str, ranks.Fine]:
    counted: dict[str, ranks.Fine] = {name: {} for name in METRICS}
    for path in files:
        table = _read(path)
        for name, column in METRICS.items():
            ranks.add(counted[name], ranks.fine(_flat(table, column), bins[name]))
    return counted


def _write_shards(
    files: Sequence[Location],
    file_of: np.ndarray,
    row_of: np.ndarray,
    numbers: range,
    count: int,
    rows_a_shard: int,
    output: Location,
    metadata: dict[str, str],
    recipe: Recipe,
    cuts: tuple[float, float],
) -> Written:
    """Write some shards, `numbers` of `count`: their rows lie in `files`, each in the file and row named. `cuts` are
    the least KL of a step that is kept, and of one that is counted as a top one."""
    least_kl, top_kl = cuts
    parts, at = [], []
    for number, path in enumerate(files):
        mine = np.flatnonzero(file_of == number)
        parts.append(_read(path).take(row_of[mine]))
        at.append(mine)
    rows = pa.concat_tables(parts).take(np.argsort(np.concatenate(at)))
    written = Written()
    for start, number in enumerate(numbers):
        part = rows.slice(start * rows_a_shard, rows_a_shard).select(SHARD.names).combine_chunks()
        rank_S = _flat(part, "teacher_rank_T")[_flat(part, "kl_T") >= top_kl]
        table = _keep(part, least_kl, recipe)
        name = shard_name(number, count)
        digest = write_shard(output / SHARDS / name, table, metadata)
        kept = len(table["kept"].combine_chunks().flatten())
        hits = Counter({k: int((rank_S < k).sum()) for k in HITS})
        written.add(Written(kept, len(rank_S), hits, {name: digest}))
    return written


def _write_thresholds(
    shards: Sequence[Location],
    thresholds: dict[str, dict[float, float]],
    steps: int,
    metadata: dict[str, str],
    path: Location,
) -> None:
    """Write the calibration; the hashes of all prompts are part of it."""
    asked: set[str] = set()
    for shard in shards:
        asked.update(questions(_read(shard)))
    calibration = Calibration(
        **thresholds,
        steps=steps,
        rows=tuple(sorted(asked)),
        **{name: metadata[f"s2t.{name}"] for name in ("task", "slm", "teacher", "tokenizer", "divergence")},
    )
    write_json(path, calibration.model_dump(mode="json"))


def _keep(table: pa.Table, least_kl: float, recipe: Recipe) -> pa.Table:
    """Drop the candidates of all steps but the top ones by KL and, of the rest, a random share."""
    column = table["kept"].combine_chunks()
    flat = column.flatten()
    lengths = column.value_lengths().fill_null(0).to_numpy()
    kl_S = _flat(table, "kl_T")
    by_kl_S = kl_S >= least_kl
    share = recipe.collect.random_steps
    noise = [uniforms(seed, 0, int(n), "trigger") for seed, n in zip(table["seed"].to_pylist(), lengths, strict=True)]
    stays_S = by_kl_S | (np.concatenate(noise) < share)
    row_S = np.repeat(np.arange(len(table)), lengths)
    counts = np.bincount(row_S[stays_S], minlength=len(table))
    steps = flat.filter(pa.array(stays_S))
    fields = {field.name: steps.field(field.name) for field in steps.type}
    fields["by_kl"] = pa.array(by_kl_S[stays_S])
    struct = pa.StructArray.from_arrays(list(fields.values()), fields=list(steps.type))
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    kept = pa.ListArray.from_arrays(offsets, struct, type=SHARD.field("kept").type, mask=column.is_null())
    return table.set_column(table.schema.get_field_index("kept"), SHARD.field("kept"), kept)


def _read(path: Location) -> pa.Table:
    return read_sealed(path, check=False)  # which the survey has done


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """A column of lists of the rows without an error, laid end to end."""
    lists = table[name].filter(pc.is_null(table["error"]))
    return np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks] or [np.zeros(0)])


def _quantiles(values: dict[int, float], total: int) -> dict[str, float]:
    found = {}
    for share in QUANTILES:
        low, high, between = ranks.quantile_ranks(total, share)
        found[str(share)] = values[low] + between * (values[high] - values[low])
    return found
