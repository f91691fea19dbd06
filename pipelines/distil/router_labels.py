"""R2R's labels of the training prompts, made on Ray Data and kept in files until the router is trained.

Each batch of prompts is a file with its checksum and is committed on its own: labelling that was killed goes on behind
what is committed, and asks nothing twice. Features are most of what there is, about 12 KB a step at a hidden size of
1536. They stay in the files until the training reads them; what comes to the driver is some numbers a prompt.

Axes: _T step, _F feature, _P prompt, in the order of their uids.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from pipelines.data.seal import Damaged, read_sealed
from pipelines.data.sink import OWN_TASKS, ArrowSink, CommittedRows, DamagedFiles, committed, on_record, rows_left
from pipelines.distil.inputs import DistilError
from pipelines.runtime.progress import Progress
from s2t_models import chat, loading
from s2t_models.engines.contract import EngineDied
from s2t_models.engines.load import load
from s2t_models.engines.metering import Metered
from s2t_models.errors import one_line
from s2t_models.hosting import Hosted, pair
from s2t_models.policies import r2r_labels
from s2t_models.policies.base import Engines
from s2t_models.policies.r2r_labels import label
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from s2t_models.threads import use_threads
from serving import cluster, placement
from serving.written import keep_posted, new_board, total

#: What is labelled. `index` is the prompt's place in the order of the uids, which is that of the training's steps.
PROMPT = pa.schema([("index", pa.int64()), ("uid", pa.string()), ("prompt_ids", pa.list_(pa.int32()))])
#: One prompt's labelled steps, laid end to end, and the tokens that the teacher read and wrote for them; `error` where
#: the row failed, which costs no other row. The lists are large ones: the features of one batch may be more than the
#: 2^31 numbers that the offsets of others reach.
LABELLED = pa.schema(
    [
        PROMPT.field("index"),
        PROMPT.field("uid"),
        ("inputs", pa.large_list(pa.float32())),
        ("labels", pa.large_list(pa.int8())),
        ("read", pa.int64()),
        ("written", pa.int64()),
        ("error", pa.string()),
    ]
)


class RouterLabels:
    """An actor that holds both engines and labels batches of prompts. The `board` is told how many tokens the teacher
    has written."""

    def __init__(self, recipe: Recipe, hosted: dict[str, Hosted], board: Any = None) -> None:
        use_threads(recipe.collect.label.num_cpus)
        self.tokenizer = loading.load_tokenizer(hosted["slm"].settings)
        self.slm, self.teacher = load(hosted["slm"]), load(hosted["teacher"])
        keep_posted(self.slm, "slm")
        keep_posted(self.teacher, "teacher", board)
        self.settings = recipe.router
        self.loop = asyncio.new_event_loop()

    def __call__(self, prompts: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(self.loop.run_until_complete(self._label(prompts.to_pylist())), LABELLED)

    async def _label(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._row(row) for row in rows)))

    async def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        settings, teacher = self.settings, Metered(self.teacher)
        engines = Engines(
            {"slm": self.slm, "teacher": teacher},
            partial(chat.decode, self.tokenizer),
            partial(chat.encode, self.tokenizer),
        )
        by_teacher = settings.judge == "teacher"
        judge = r2r_labels.ask(teacher, self.tokenizer) if by_teacher else r2r_labels.numbers_differ
        labelled: dict[str, Any] = {"index": row["index"], "uid": row["uid"]}
        try:
            steps = await label(engines, row["prompt_ids"], judge, settings.max_new_tokens, settings.support)
            labelled |= {"inputs": steps.inputs_TF.ravel(), "labels": steps.labels_T}
        except EngineDied:
            os._exit(1)  # as if it had died with its engine: Ray starts the actor again, and the batch with it
        except Exception as error:  # one row's fault is one row's error, counted and named at the end
            labelled["error"] = f"{type(error).__name__}: {one_line(error)}"
        return labelled | {"read": teacher.usage.prefill, "written": teacher.usage.decode}


def label_prompts(recipe: Recipe, prompts: pa.Table, state: Location) -> list[Location]:
    """Label those of the `prompts` (schema PROMPT) that are not labelled yet; returns the files that hold all of them,
    which lie in the folder `state`. Raises ClusterError, StorageError or DistilError."""
    folder, checkpoint = state / "labelled", checkpoint_of(state)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.mkdir(exist_ok=True)
    rows_done = CommittedRows(folder, checkpoint)
    if rows_done() < len(prompts):
        stage = recipe.collect.label
        # A teacher on several GPUs asks for a placement group of its own, beside what the actor takes for the SLM.
        group = [{"GPU": bundle["GPU"]} for bundle in placement.bundles(recipe.teacher, stage.num_cpus) or []]
        actor = {"CPU": stage.num_cpus, "GPU": stage.num_gpus}
        cluster.require([*stage.actors * [actor, *group], *OWN_TASKS], f"{recipe.name}: router labels")
        batch = min(stage.batch, -(-len(prompts) // stage.actors))  # so that there is one for each actor
        try:
            with on_record(checkpoint):
                board = new_board()
                rows = rows_left(prompts, state / "prompts.parquet", batch).map_batches(
                    RouterLabels,
                    fn_constructor_args=(recipe, pair(recipe), board),
                    batch_size=batch,
                    batch_format="pyarrow",
                    udf_modifying_row_count=False,
                    compute=ActorPoolStrategy(size=stage.actors),
                    num_cpus=stage.num_cpus,
                    num_gpus=stage.num_gpus,
                )
                with Progress("distil router: labels", "prompts", len(prompts), rows_done, lambda: total(board)):
                    rows.write_datasink(ArrowSink(folder, LABELLED))
        except ray.exceptions.RayError as error:
            raise DistilError(
                f"{recipe.name}: labelling failed: {one_line(error)}; the same command goes on from {state}"
            ) from error
    return committed(folder, checkpoint)


def checkpoint_of(state: Location) -> Location:
    """Where the commits of the labelled files are."""
    return state / "checkpoint"


@dataclass
class Survey:
    """What labelled files hold, by prompt: its file's number, its row there, its steps (none where it failed), how many
    of them are divergent, and the tokens that the teacher read and wrote for it; and why prompts failed."""

    file_P: np.ndarray
    row_P: np.ndarray
    steps_P: np.ndarray
    divergent_P: np.ndarray
    read_P: np.ndarray
    written_P: np.ndarray
    errors: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_nothing(cls, prompts: int) -> Survey:
        none_P = np.zeros((5, prompts), np.int64)
        return cls(np.full(prompts, -1), none_P[0], none_P[1], none_P[2], none_P[3], none_P[4])

    @property
    def missing(self) -> int:
        """How many prompts are in no file."""
        return int((self.file_P < 0).sum())

    @property
    def first_error(self) -> str | None:
        """Why the first of the prompts that failed did."""
        return self.errors[min(self.errors)] if self.errors else None


def survey(files: Sequence[Location], prompts: int) -> Survey:
    """What the files hold of so many prompts; all of their checksums are checked. Raises DamagedFiles."""
    found = Survey.of_nothing(prompts)
    damaged: list[tuple[Location, str]] = []
    for number, path in enumerate(files):
        try:
            table = read_sealed(path)
        except Damaged as error:
            damaged.append((path, str(error)))
            continue
        index = table["index"].to_numpy()
        found.file_P[index], found.row_P[index] = number, np.arange(len(index))
        found.read_P[index], found.written_P[index] = table["read"].to_numpy(), table["written"].to_numpy()
        for at, labels, reason in zip(index.tolist(), table["labels"], table["error"].to_pylist(), strict=True):
            labels_T = _values(labels)
            found.steps_P[at], found.divergent_P[at] = len(labels_T), labels_T.sum()
            if reason is not None:
                found.errors[at] = reason
    if damaged:
        raise DamagedFiles(damaged)
    return found


def read_steps(files: Sequence[Location], found: Survey, features: int) -> tuple[np.ndarray, np.ndarray]:
    """The inputs [T, F] and labels [T] of all steps in the files, prompt by prompt, whatever file each is in: one copy,
    filled a file at a time. Raises DamagedFiles where a file is not what `survey` found."""
    end_P = found.steps_P.cumsum()
    steps = int(found.steps_P.sum())
    inputs_TF, labels_T = np.empty((steps, features), np.float32), np.empty(steps, np.int8)
    for number, path in enumerate(files):
        try:
            table = read_sealed(path, check=False)
        except Damaged as error:
            raise DamagedFiles([(path, str(error))]) from None
        for at in np.flatnonzero((found.file_P == number) & (found.steps_P > 0)):
            place, row = slice(end_P[at] - found.steps_P[at], end_P[at]), int(found.row_P[at])
            inputs_TF[place] = _values(table["inputs"][row]).reshape(-1, features)
            labels_T[place] = _values(table["labels"][row])
    return inputs_TF, labels_T


def _values(labelled: Any) -> np.ndarray:
    """The numbers of one row's list, none where it has none."""
    return labelled.values.to_numpy() if labelled.is_valid else np.zeros(0, np.int8)
