"""What a training may begin with: collections of the recipe's pair, of no test split, that share no row; and their
record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.shards import ShardError, check_pair, questions, read_shards, shards_digest
from pipelines.tasks import TASKS
from pipelines.tasks.splits import refuse_overlap
from s2t_models import loading
from s2t_models.errors import UserError
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.training.batches import Trajectory, trajectories

#: Ends of the names of tasks whose rows may be trained or calibrated on; the other benchmark tasks are test splits.
NOT_TEST = ("-train", "-calibration", "-validation")


class DistilError(UserError):
    """A training that cannot begin or go on; the message is one line."""


def training_folder(output: Path) -> Path:
    """Where the state of an unfinished training lies, on the file system of `output`."""
    return output.resolve().with_name(output.resolve().name + ".training")


def read_training(recipe: Recipe, folder: Path) -> tuple[pa.Table, dict[str, str]]:
    """A collection that may be trained or calibrated on. Raises ShardError where it is of another pair or of a test
    split."""
    table, metadata = read_shards(folder)
    slm, teacher = loading.weights_hash(recipe.slm), loading.weights_hash(recipe.teacher)
    check_pair(metadata, slm, teacher, loading.tokenizer_hash(recipe.slm))
    task = metadata["s2t.task"]
    if task in TASKS and not task.endswith(NOT_TEST):
        raise ShardError(f"{folder}: collected on {task}, a test split; train and calibrate on other rows")
    return table, metadata


def read_trajectories(folder: Path) -> list[Trajectory]:
    """The trajectories of a collection that was checked before."""
    return trajectories(read_shards(folder)[0].to_pylist())


def check_inputs(
    recipe: Recipe,
    objective: str,
    shards: Path,
    calibration: Path | None,
    seeds: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Provenance:
    """Check the collections and return the record of a training on them that has not begun.

    Raises ShardError where one is of another pair or of a test split or has no labelled step, or where both share a row
    or were made with different divergences.
    """
    digests: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    divergences: dict[str, str] = {}
    for role, folder in (("training", shards), ("calibration", calibration)):
        if folder is None:
            continue
        table, metadata = read_training(recipe, folder)
        _require_a_labelled_step(folder, table)
        digests[role] = shards_digest(folder)
        divergences[role] = metadata["s2t.divergence"]
        rows[f"{role} ({metadata['s2t.task']})"] = questions(table)
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
    )


def _require_a_labelled_step(folder: Path, table: pa.Table) -> None:
    if not pc.sum(pc.list_value_length(table["kept"])).as_py():
        raise ShardError(f"{folder}: no row has a labelled step; collect more prompts")
