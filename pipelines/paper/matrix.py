"""The matrix: which collections, trainings and benchmarks `s2t paper` runs, as a YAML file. One ships (`matrix.yaml`).

What of it a build, a recipe or the chosen tasks cannot give is no fault of the file: it is left open when it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from s2t_models.errors import UserError, first_problem
from s2t_models.storage import Location

#: The training whose artifact is the recipe's own.
SELECTOR = "selector"
#: Comes before the name of a selector, for plain greedy decoding of the fine-tuned model (Table A1's FT Greedy).
FINE_TUNED = "ft-"


class MatrixError(UserError):
    """A matrix that cannot be used; the message is one line."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _among(chosen: Sequence[str], named: Sequence[str]) -> tuple[str, ...]:
    """The chosen tasks that are named, or all where none is named; where none of those named is chosen, the first
    chosen one stands in for them."""
    return tuple(task for task in chosen if not named or task in named) or tuple(chosen[:1])


class CollectionPart(_Part):
    """The recipe's own prompts, which `teacher` lets the teacher answer, or (`tasks`) those of each chosen task among
    `tasks`, rolled out greedily."""

    of: Literal["train", "teacher", "calibration", "tasks"]
    tasks: tuple[str, ...] = ()
    items: int = Field(0, ge=0)
    set: dict[str, Any] = {}

    def run_on(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """Its tasks where these are chosen."""
        return _among(chosen, self.tasks)


class TrainingPart(_Part):
    """An objective on the collection `shards`, with the recipe's settings changed by `set`."""

    objective: str
    shards: str = "train"
    set: dict[str, Any] = {}


def _flat(policies: Any) -> Any:
    """A list of names and of lists of names as one list."""
    if not isinstance(policies, list):
        return policies
    return [name for entry in policies for name in (entry if isinstance(entry, list) else [entry])]


class BenchmarkPart(_Part):
    """Policies on the chosen tasks among `tasks` (empty: on all), with the recipe's settings changed by `set`. Where
    none of these is chosen, `stand_ins` are the tasks that are run for a chosen one; without it that is the first
    chosen one."""

    policies: Annotated[tuple[str, ...], BeforeValidator(_flat), Field(min_length=1)]
    tasks: tuple[str, ...] = ()
    stand_ins: dict[str, tuple[str, ...]] | None = None
    items: int = Field(0, ge=0)
    seeds: tuple[int, ...] = ()
    audit: bool = False
    set: dict[str, Any] = {}

    def run_on(self, chosen: Sequence[str]) -> tuple[str, ...]:
        """Its tasks where these are chosen; none where none of them is and nothing stands in."""
        if self.stand_ins is None or set(chosen) & set(self.tasks):
            return _among(chosen, self.tasks)
        return tuple(dict.fromkeys(task for one in chosen for task in self.stand_ins.get(one, ())))


class Matrix(_Part):
    """Everything that is run, by name."""

    collections: dict[str, CollectionPart] = {}
    trainings: dict[str, TrainingPart] = {}
    benchmarks: dict[str, BenchmarkPart] = {}

    @model_validator(mode="after")
    def _hangs_together(self) -> Matrix:
        for name, training in self.trainings.items():
            if training.shards not in self.collections:
                raise ValueError(f"trainings.{name}: there is no collection {training.shards}")
        return self


def load_matrix(path: Location | None = None) -> Matrix:
    """The matrix in a file; the one that ships without one. Raises MatrixError naming the file and what is wrong."""
    where = path or Path(str(files("pipelines.paper") / "matrix.yaml"))
    try:
        values = yaml.safe_load(where.read_bytes())
    except OSError as error:
        raise MatrixError(f"{where}: {error.strerror or error}; give a matrix file to --matrix") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MatrixError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        return Matrix.model_validate(values)
    except ValidationError as error:
        raise MatrixError(f"{where}: {first_problem(error)}; docs/paper.md says what a matrix may hold") from None
