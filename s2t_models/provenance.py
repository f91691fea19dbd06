"""Where a trained model comes from: the inputs and settings it was made with, and how its training went.

An artifact's card holds it; a plain checkpoint and a router keep it in `provenance.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from s2t_models.errors import UserError, first_problem
from s2t_models.settings import Writer
from s2t_models.storage import Location

PROVENANCE = "provenance.json"
#: What came of a training, and the recipe's digest, which covers settings that no training reads.
_NO_INPUTS = {"recipe", "validation", "begun_at_steps", "trigger_head", "decider", "calibration_steps", "teacher"}


class ProvenanceError(UserError):
    """A provenance that cannot be read; the message is one line."""


class TeacherTokens(BaseModel):
    """What was asked of the teacher, in tokens: those it read, and those it wrote."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read: int = 0
    written: int = 0

    def __add__(self, other: TeacherTokens) -> TeacherTokens:
        return TeacherTokens(read=self.read + other.read, written=self.written + other.written)

    @classmethod
    def of_collection(cls, writer: Writer, read: int, outputs: int) -> TeacherTokens:
        """Of a collection whose outputs have so many tokens."""
        return cls(read=read, written=outputs if writer == "teacher" else 0)


class Provenance(BaseModel):
    """The record of one training. Weights, tokenizer, shards and rows are given as sha256.

    `shards` maps a role ("training", "calibration") to the digest of its files; `rows` maps "role (task)" to the hashes
    of its prompts (`splits.question_hashes`), so that a benchmark can refuse rows that were trained on. `settings` are
    those that decide the result, by their name in the recipe. Of the outcome: `validation` holds the figures of the
    checkpoint that was taken, `begun_at_steps` the optimiser steps at which worker groups began, `trigger_head` the
    head's figures, `decider` those of Think-at-Hard's decider, and `calibration_steps` how many steps thresholds are
    percentiles of. `teacher` is all that was asked of the teacher for it: in the collections it used, and while it was
    trained.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    objective: str
    recipe: str
    base_weights: str
    teacher_weights: str
    tokenizer: str
    divergence: str
    shards: dict[str, str]
    rows: dict[str, tuple[str, ...]]
    seeds: dict[str, int]
    settings: dict[str, Any]
    validation: dict[str, float] = {}
    begun_at_steps: tuple[int, ...] = ()
    trigger_head: dict[str, float] = {}
    decider: dict[str, float] = {}
    calibration_steps: int | None = None
    teacher: TeacherTokens | None = None

    def has_inputs_of(self, other: Provenance) -> bool:
        """Whether both are of the same inputs and settings, so that one training would give what the other gave."""
        return self.model_dump(exclude=_NO_INPUTS) == other.model_dump(exclude=_NO_INPUTS)

    def write(self, folder: Path) -> None:
        """Write `folder`/provenance.json."""
        (folder / PROVENANCE).write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, folder: Location) -> Provenance | None:
        """Read `folder`/provenance.json; None where there is no such file. Raises ProvenanceError."""
        path = folder / PROVENANCE
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise ProvenanceError(f"{path}: {first_problem(error)}") from None
