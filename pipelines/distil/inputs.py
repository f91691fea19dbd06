"""What a training may begin with: collections of the recipe's pair, of no test split, that share no row; and their
record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.layout import COLLECTED
from pipelines.data.shards import (
    ShardError,
    check_pair,
    each_shard,
    metadata_of,
    questions,
    read_metadata,
    shards_digest,
)
from pipelines.tasks import TASKS
from pipelines.tasks.splits import refuse_overlap
from s2t_models import loading
from s2t_models.calibration import Calibration
from s2t_models.errors import UserError
from s2t_models.provenance import Provenance, TeacherTokens
from s2t_models.recipe import Recipe
from s2t_models.settings import Role, Writer
from s2t_models.storage import Location, ObjectPath

#: Ends of the names of tasks whose rows may be trained or calibrated on; the other benchmark tasks are test splits.
NOT_TEST = ("-train", "-calibration", "-validation")


#: Who writes texts, in words.
WRITERS: Mapping[Writer, str] = {"slm": "the SLM", "teacher": "the teacher", "s2t": "S2T"}
#: Who may have written what an objective is trained on that wants this model to have rolled out.
ROLLED_OUT_BY: Mapping[Role, Sequence[Writer]] = {"slm": ("slm", "s2t"), "teacher": ("teacher",)}


class DistilError(UserError):
    """A training that cannot begin or go on; the message is one line."""


@dataclass(frozen=True)
class Collection:
    """What a training needs to know of a collection before it begins: what its shards carry, the hashes of its prompts,
    how many steps are labelled, and what it asked of the teacher."""

    metadata: dict[str, str]
    questions: list[str]
    kept_steps: int
    teacher: TeacherTokens

    @classmethod
    def read(cls, folder: Location) -> Collection:
        """From the shards, one at a time; of an object store from what the collection says of itself, so that nothing
        of the rows comes here. Raises ShardError, and CalibrationError."""
        if isinstance(folder, ObjectPath):
            metadata = read_metadata(folder)
            summary = json.loads((folder / COLLECTED).read_text())
            teacher = TeacherTokens(read=summary["teacher_prefill"], written=summary["teacher_decode"])
            return cls(metadata, list(Calibration.read(folder).rows), summary["kept_steps"], teacher)
        asked: set[str] = set()
        uids: set[str] = set()
        kept = read = outputs = 0
        for table in each_shard(folder):
            known = len(uids)
            uids.update(table["uid"].to_pylist())
            if len(uids) < known + len(table):
                raise ShardError(f"{folder}: a row occurs twice; delete {folder} and collect again")
            asked.update(questions(table))
            kept += _items(table["kept"])
            whole = table.filter(table["error"].is_null())
            read, outputs = (
                read + int(pc.sum(whole["teacher_read"]).as_py() or 0),
                outputs + _items(whole["output_ids"]),
            )
        metadata = metadata_of(table)
        return cls(metadata, sorted(asked), kept, TeacherTokens.of_collection(written_by(metadata), read, outputs))


def _items(column: pa.ChunkedArray) -> int:
    """How many items the lists of a column hold."""
    return int(pc.sum(pc.list_value_length(column)).as_py() or 0)


def written_by(metadata: Mapping[str, str]) -> Writer:
    """Who wrote the texts of a collection."""
    return json.loads(metadata["s2t.recipe"])["collect"].get("writer", "slm")  # type: ignore[no-any-return]


def training_folder(output: Location) -> Location:
    """Where the state of an unfinished training lies, beside `output`."""
    return output.resolve().with_name(output.resolve().name + ".training")


def read_collection(recipe: Recipe, folder: Location) -> Collection:
    """A collection that may be trained or calibrated on. Raises ShardError where it is of another pair or of a test
    split."""
    found = Collection.read(folder)
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    check_pair(found.metadata, slm, teacher, loading.tokenizer_hash(recipe.slm))
    task = found.metadata["s2t.task"]
    if task in TASKS and not task.endswith(NOT_TEST):
        raise ShardError(f"{folder}: collected on {task}, a test split; train and calibrate on other rows")
    return found


def check_inputs(
    recipe: Recipe,
    objective: str,
    shards: Location,
    calibration: Location | None,
    seeds: Mapping[str, int],
    settings: Mapping[str, Any],
    drafter: Role = "slm",
) -> Provenance:
    """Check the collections, whose texts the `drafter` rolled out, and return the record of a training on them that has
    not begun.

    Raises ShardError where one is of another pair, of a test split or of another writer or has no labelled step, or
    where both share a row or were made with different divergences.
    """
    digests: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    divergences: dict[str, str] = {}
    teacher = TeacherTokens()
    for role, folder in (("training", shards), ("calibration", calibration)):
        if folder is None:
            continue
        found = read_collection(recipe, folder)
        if not found.kept_steps:
            raise ShardError(f"{folder}: no row has a labelled step; collect more prompts")
        metadata = found.metadata
        # Thresholds are percentiles of what the SLM writes on its own.
        writers = ROLLED_OUT_BY[drafter] if role == "training" else ("slm",)
        if (writer := written_by(metadata)) not in writers:
            wanted = " or ".join(WRITERS[one] for one in writers)
            option = " --calibration" if role == "calibration" else " --teacher" if drafter == "teacher" else ""
            raise ShardError(
                f"{folder}: its texts are by {WRITERS[writer]}, and the {role} of {objective} takes those of {wanted}; "
                f"make a collection of its own with s2t collect{option}"
            )
        teacher += found.teacher
        digests[role] = shards_digest(folder)
        divergences[role] = metadata["s2t.divergence"]
        rows[f"{role} ({metadata['s2t.task']})"] = found.questions
    if len(set(divergences.values())) > 1:
        of = "; ".join(f"{role}: {divergence}" for role, divergence in divergences.items())
        raise ShardError(f"{calibration}: collected with another divergence than the training shards ({of})")
    try:
        refuse_overlap(rows)
    except ValueError as error:
        raise ShardError(str(error)) from None
    return Provenance(
        objective=objective,
        recipe=recipe.digest(),
        base_weights=metadata["s2t.slm"],
        teacher_weights=metadata["s2t.teacher"],
        tokenizer=metadata["s2t.tokenizer"],
        divergence=divergences["training"],
        shards=digests,
        rows={name: tuple(hashes) for name, hashes in rows.items()},
        seeds=dict(seeds),
        settings=dict(settings),
        teacher=teacher,
    )
