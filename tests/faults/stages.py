"""The stages as commands on a cluster, small enough to be run a hundred times; how far a run has got, and what its
output lost against that of an undisturbed run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2t_models.provenance import Provenance
from s2t_models.storage import Location, ObjectPath

REPOSITORY = Path(__file__).resolve().parents[2]
#: A training evaluates and keeps a checkpoint each INTERVAL of its STEPS. Ray's controller looks for new ones every two
#: seconds, in which a worker may make one more; it does not begin a third before they are known.
STEPS, INTERVAL = 40, 4
MADE_AGAIN = 2 * INTERVAL
#: One worker a node, and one alone where a node is lost.
ELASTIC = {"num_cpus": 3, "min_workers": 1}
#: Figures of two trainings that only rounding tells apart.
NEAR = 0.02
#: Those that are compared where the number of workers changes. Rounding is another then from the first step on, and
#: grows: by the size of micro-batches alone, KL to the base after 12 steps was 0.027 or 0.021 nats.
LEARNED = ("agree_at_1", "agree_at_1_random", "selection_loss")
#: Share of what a router's teacher reads that it reads again where actors, and their caches with them, were lost.
READ_AGAIN = 0.1


@dataclass(frozen=True)
class Loss:
    """What a run's output lost against an undisturbed one: rows that are missing (of a training, steps made again that
    need not have been), and rows or figures that differ."""

    lost: int
    differing: int


@dataclass(frozen=True)
class Stage:
    """`arguments(inputs, output)` is its command, `progress(output)` how much of `total` is done, `loss(output,
    undisturbed)` compares two outputs. `actors` are the titles of the Ray actors that do its work, `repeated(output)`
    the most steps that a training which runs has made again at once."""

    name: str
    arguments: Callable[[Path, Any], list[str]]
    progress: Callable[[Any], int]
    total: int
    loss: Callable[[Any, Path], Loss]
    actors: tuple[str, ...] = ()
    repeated: Callable[[Any], int] = lambda output: 0
    on_ray: bool = True

    def command(self, inputs: Path, output: Location) -> list[str]:
        return [sys.executable, "-m", *self.arguments(inputs, output)]


def prepare(inputs: Path) -> None:
    """Make the collections that trainings and analyses read, `train` and `calibration`, without Ray. Left as they are
    where they are there."""
    from pipelines.data.layout import SHARDS
    from pipelines.data.schema import SHARD
    from pipelines.data.shards import shard_metadata, shard_name, write_shard
    from s2t_models.loading import tokenizer_hash, weights_hash
    from s2t_models.recipe import load_recipe
    from s2t_models.storage import whole

    sys.path.append(str(REPOSITORY / "tests"))
    import pyarrow as pa
    from labelled_rows import labelled_rows

    recipe = load_recipe("embedded")
    pair = weights_hash(recipe.slm), weights_hash(recipe.teacher), tokenizer_hash(recipe.slm)
    for name, count in (("train", 24), ("calibration", 6)):
        task = f"embedded-{name}"
        if not (inputs / name).is_dir():
            inputs.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(labelled_rows(recipe, task, count), SHARD)
            halves = table.slice(0, count // 2), table.slice(count // 2)
            with whole(inputs / name) as part:
                (part / SHARDS).mkdir(parents=True)
                collected = recipe.calibrating() if name == "calibration" else recipe
                metadata = shard_metadata(collected, *pair, task)
                for index, half in enumerate(halves):
                    write_shard(part / SHARDS / shard_name(index, 2), half, metadata)


def _collect(writer: str) -> Callable[[Path, Location], list[str]]:
    def arguments(inputs: Path, output: Location) -> list[str]:
        return ["pipelines.collect", "--recipe", "embedded", "--output", str(output), *_set(settings)]

    settings = {
        "collect.writer": writer,
        "trigger.threshold": 0.1,
        "collect.prompts": 48,
        "collect.max_new_tokens": 120,
        "collect.rollout.actors": 2,
        "collect.rollout.batch": 4,
        "collect.rollout.num_cpus": 0.5,
        "collect.label.batch": 4,
        "collect.label.num_cpus": 0.5,
    }
    return arguments


def _rows_committed(output: Location) -> int:
    from pipelines.data.sink import CommittedRows

    return CommittedRows(output / "work" / "labelled", output / "work" / "checkpoint")()


def _collection_loss(output: Location, undisturbed: Path) -> Loss:
    from pipelines.data.shards import read_shards

    rows, expected = (
        {row["uid"]: row for row in read_shards(folder)[0].to_pylist()} for folder in (output, undisturbed)
    )
    figures = [json.loads((folder / "collect.json").read_text()) for folder in (output, undisturbed)]
    differing = [uid for uid in rows.keys() & expected.keys() if not _is_near(rows[uid], expected[uid], 1e-3)]
    extra = rows.keys() - expected.keys()
    return Loss(len(expected.keys() - rows.keys()), len(differing) + len(extra) + (not _is_near(*figures, 1e-3)))


def _distil(objective: str, **changes: Any) -> Callable[[Path, Location], list[str]]:
    def arguments(inputs: Path, output: Location) -> list[str]:
        settings = {
            "distil.workers": 2,
            "distil.steps": STEPS,
            "distil.evaluate_every": INTERVAL,
            "distil.batch": 4,
            "distil.lora.rank": 4,
            "distil.validation": 0.2,
            "distil.min_teacher_margin": 0.1,
            "trigger_head.epochs": 2,
            "trigger_head.positives": 0.2,
            **{f"distil.{key}": value for key, value in changes.items()},
        }
        shards = ["--shards", str(inputs / "train"), "--objective", objective]
        if objective == "selector":
            shards += ["--calibration", str(inputs / "calibration")]
        return ["pipelines.distil", "--recipe", "embedded", *shards, "--output", str(output), *_set(settings)]

    return arguments


def _router(inputs: Path, output: Location) -> list[str]:
    settings = {
        "collect.label.num_cpus": 0.5,
        "collect.label.batch": 4,
        "collect.label.actors": 2,
        "router.max_new_tokens": 120,
        "router.width": 32,
        "router.blocks": 1,
        "router.epochs": 3,
    }
    trained = ["--shards", str(inputs / "train"), "--objective", "router", "--output", str(output)]
    return ["pipelines.distil", "--recipe", "embedded", *trained, *_set(settings)]


def _prompts_labelled(output: Location) -> int:
    from pipelines.data.sink import CommittedRows
    from pipelines.distil.inputs import training_folder

    states = training_folder(output).glob("router-*")
    return sum(CommittedRows(state / "labelled", state / "checkpoint")() for state in states)


def _router_loss(output: Location, undisturbed: Path) -> Loss:
    from s2t_models.router import load_router

    done, expected = (provenance.teacher for provenance in _provenances(output, undisturbed))
    assert done is not None
    assert expected is not None
    asked = done.written == expected.written and _is_near(float(done.read), float(expected.read), READ_AGAIN)
    one, other = (load_router(folder) for folder in (output, undisturbed))
    weights = other.state_dict()
    near = [np.allclose(part, weights[name], NEAR, NEAR / 10) for name, part in one.state_dict().items()]
    threshold = _is_near(one.settings.threshold, other.settings.threshold, NEAR)
    return Loss(0, (not asked) + (not threshold) + near.count(False))


def _training_log(output: Location) -> list[dict[str, Any]]:
    """What the worker groups of a training have written, one group after the other."""
    from pipelines.distil.inputs import training_folder

    training = training_folder(output)
    if isinstance(training, ObjectPath):
        paths: list[Any] = [training / name for name in training.files() if name.endswith(".jsonl")]
    else:
        paths = sorted(training.glob("*/curves/*.jsonl"))
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _steps(output: Location) -> int:
    return max((record.get("step", 0) for record in _training_log(output)), default=0)


def _repeated(output: Location) -> int:
    most = step = 0
    for record in _training_log(output):
        if "begun" in record:
            most = max(most, step - record["begun"])
        step = max(step, record.get("step", 0))
    return most


def _provenances(*folders: Location) -> list[Provenance]:
    from s2t_models.artifact import read_provenance

    found = [read_provenance(folder) for folder in folders]
    assert None not in found
    return [provenance for provenance in found if provenance is not None]


def _elastic_loss(output: Location, undisturbed: Path) -> Loss:
    done, expected = _provenances(output, undisturbed)
    learned = [_is_near(done.validation[name], expected.validation[name], NEAR) for name in LEARNED]
    return Loss(0, learned.count(False))


def _training_loss(output: Location, undisturbed: Path) -> Loss:
    done, expected = _provenances(output, undisturbed)
    has_rows = done.rows == expected.rows and done.shards == expected.shards
    figures = _is_near(done.validation, expected.validation, NEAR)
    return Loss(0 if has_rows else 1, (not figures) + (not _is_near(done.trigger_head, expected.trigger_head, NEAR)))


def _benchmark(inputs: Path, output: Location) -> list[str]:
    settings = {
        "slm.num_cpus": 0.5,
        "teacher.num_cpus": 0.5,
        "serving.port": 18431,
        "benchmark.concurrency": 8,
        "collect.prompts": 50,
    }
    asked = ["--policies", "greedy,sample,llm", "--items", "24", "--seeds", "0,1"]
    return ["pipelines.benchmark", "--recipe", "embedded", "--output", str(output), *asked, *_set(settings)]


def _answers(output: Location) -> int:
    return sum(path.read_bytes().count(b"\n") for path in (output / "answers").glob("*.jsonl"))


def _results_loss(output: Location, undisturbed: Path) -> Loss:
    from pipelines.data.layout import RESULTS
    from pipelines.results.summary import read_results

    timing = ["seconds", "client_seconds", "usage"]  # usage counts what a cache spared
    frame, expected = (
        read_results(folder / RESULTS)[0].set_index("key").drop(columns=timing) for folder in (output, undisturbed)
    )
    twice = frame.index.duplicated()
    frame = frame[~twice]
    both = frame.index.intersection(expected.index)
    one, other = frame.loc[both].astype(str), expected.loc[both].astype(str)
    same = (one == other) | (one.isna() & other.isna())  # what is missing stays so as text, and equals nothing
    return Loss(len(expected.index.difference(frame.index)), int((~same.all(axis=1)).sum()) + int(twice.sum()))


def _analyse(inputs: Path, output: Location) -> list[str]:
    return ["pipelines.analyse", str(inputs / "train"), "--output", str(output)]


def _tables(output: Location) -> int:
    return len(list(output.glob("*.csv")))


def _tables_loss(output: Location, undisturbed: Path) -> Loss:
    names = {path.name for path in undisturbed.iterdir()}
    there = {path.name for path in output.iterdir()}
    tables = [name for name in names & there if name.endswith(".csv")]
    differing = [name for name in tables if (output / name).read_text() != (undisturbed / name).read_text()]
    return Loss(len(names - there), len(differing))


STAGES = {
    stage.name: stage
    for stage in (
        Stage("collect", _collect("slm"), _rows_committed, 48, _collection_loss, ("MapWorker",)),
        Stage("collect s2t", _collect("s2t"), _rows_committed, 48, _collection_loss, ("MapWorker", "EngineActor")),
        Stage("distil", _distil("selector"), _steps, STEPS, _training_loss, ("RayTrainWorker",), _repeated),
        Stage("distil kd", _distil("kd"), _steps, STEPS, _training_loss, ("RayTrainWorker",), _repeated),
        Stage("distil elastic", _distil("selector", **ELASTIC), _steps, STEPS, _elastic_loss, (), _repeated),
        Stage("distil router", _router, _prompts_labelled, 24, _router_loss, ("MapWorker",)),
        Stage("benchmark", _benchmark, _answers, 144, _results_loss, ("ServeReplica", "MapWorker")),
        Stage("analyse", _analyse, _tables, 4, _tables_loss, on_ray=False),
    )
}


def _set(settings: Mapping[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def _is_near(one: Any, other: Any, tolerance: float) -> bool:
    """Equal, but for the last bits of floats: batches fall differently."""
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=tolerance, atol=tolerance / 10, equal_nan=True))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_near(one[key], other[key], tolerance) for key in one)
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        return len(one) == len(other) and all(map(lambda a, b: _is_near(a, b, tolerance), one, other))
    return bool(one == other)
