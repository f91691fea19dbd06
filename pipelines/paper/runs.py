"""The runs of a matrix: where each lies, whether it is there, why it cannot be had, and how it is made.

A run is made by the code of its own command, so it is resumed as that resumes. What one run gives the others is taken
from the disk: a training's artifact or checkpoint is in the recipe of the benchmarks that name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.analyse.audit import TEACHER_ARGMAX, audit, prompts_of
from pipelines.analyse.kept import AUDITED, is_kept, keep
from pipelines.benchmark.job import Options, benchmark, is_done
from pipelines.collect import job as collect
from pipelines.data.layout import COLLECTED, RESULTS
from pipelines.distil.__main__ import ROUTER, train
from pipelines.paper.matrix import FINE_TUNED, SELECTOR, BenchmarkPart, Matrix
from pipelines.results.summary import read_results
from s2t_models.artifact import CARD, CHECKPOINT, MODEL, read_provenance
from s2t_models.errors import UserError, one_line
from s2t_models.hosting import LOCAL, host
from s2t_models.policies import PolicyError, lacking, policy
from s2t_models.policies.variants import variant
from s2t_models.recipe import Recipe
from s2t_models.router import SETTINGS as ROUTER_SETTINGS
from s2t_models.storage import Location, location
from s2t_models.training import objectives
from s2t_models.training.objectives import OBJECTIVES
from s2t_models.training_settings import DistilSettings


@dataclass(frozen=True)
class Given:
    """What a job is given: tasks and problems of each (None: the recipe's), and folders of collections that are there
    already, by name."""

    recipe: Recipe
    matrix: Matrix
    output: Location
    tasks: tuple[str, ...]
    items: int
    data: Path | None = None
    tracking: str | None = None
    collections: Mapping[str, Location] = field(default_factory=dict)
    unsandboxed: bool = False


@dataclass(frozen=True)
class Run:
    """One run of the matrix. `part` is its name there; a collection `of: tasks` has a run a task."""

    kind: Literal["collection", "training", "benchmark", "audit"]
    part: str
    task: str | None = None

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.kind, self.part, self.task)))


#: The one that thresholds come of.
CALIBRATION = Run("collection", "calibration")


def _part(run: Run) -> str:
    """What a run is asked for as: a training may have the name of a benchmark or a collection."""
    return f"training {run.part}" if run.kind == "training" else run.part


class Runs:
    """All runs of a job. `open` keeps why a run could not be made, by its name."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.open: dict[str, str] = {}

    def all(self) -> list[Run]:
        """Every run of the matrix, each behind those that it needs."""
        matrix = self.given.matrix
        found: list[Run] = []
        by_need = sorted(matrix.collections.items(), key=lambda part: part[1].of != "calibration")
        for name, collection in by_need:
            tasks: tuple[str | None, ...] = (None,)
            if collection.of == "tasks":
                tasks = collection.run_on(self.given.tasks)
            found += [Run("collection", name, task) for task in tasks]
        found += [Run("training", name) for name in matrix.trainings if not self.has(name)]
        for name, part in matrix.benchmarks.items():
            found.append(Run("benchmark", name))
            if part.audit:
                found.append(Run("audit", name))
        return found

    def needed(self, parts: Iterable[str]) -> list[Run]:
        """The runs behind these benchmarks and collections, in their order."""
        matrix, wanted = self.given.matrix, set(parts)
        for name in [name for name in matrix.benchmarks if name in wanted]:
            trained = {one for policy in matrix.benchmarks[name].policies if (one := training_of(policy))}
            wanted |= {f"training {one}" for one in trained & matrix.trainings.keys() if not self.has(one)}
            if not self.given.recipe.artifact:
                wanted.add("calibration")
        for run in reversed(self.all()):
            if _part(run) in wanted:
                wanted |= {source.part for source in self._sources(run)}
        return [run for run in self.all() if _part(run) in wanted]

    def folder(self, run: Run) -> Location:
        if run.kind == "collection":
            if run.part in self.given.collections:
                return self.given.collections[run.part]
            # Another number of prompts is another collection.
            size = "-".join(filter(None, (run.task, str(self._items(run.part)) if run.task else None)))
            folder = self.given.output / "collections" / run.part
            return folder / size if size else folder
        if run.kind == "training":
            return self._trained(run.part)
        return self.given.output / "benchmarks" / run.part

    def is_done(self, run: Run) -> bool:
        """Whether it is there, whole and of what is given."""
        folder = self.folder(run)
        if run.kind == "collection":
            return (folder / COLLECTED).is_file()
        try:
            if run.kind == "training":
                return self._is_trained(run.part)
            if run.kind == "audit":
                return self.has_answers(run.part) and is_kept(folder, AUDITED)
            return is_done(self.benchmark_recipe(run.part), folder)
        except UserError:  # what it is made of is not there
            return False

    def has_answers(self, benchmark: str) -> bool:
        """Whether a benchmark's results are there, of what is given; some of them may be errored. Raises UserError
        where what it is made of cannot be read."""
        results = self.folder(Run("benchmark", benchmark)) / RESULTS
        if not results.is_file():
            return False
        return read_results(results)[1]["s2t.recipe"] == self.benchmark_recipe(benchmark).model_dump_json()

    def never(self, run: Run) -> str | None:
        """Why this build and recipe cannot make the run whatever is made before it; None where they can."""
        try:
            if run.kind == "collection":
                self._collecting(run)
            elif run.kind == "training":
                self._training_recipe(run.part)
                training = self.given.matrix.trainings[run.part]
                if training.objective not in (known := (*OBJECTIVES, ROUTER)):
                    return f"this build has no objective {training.objective}; it has {', '.join(known)}"
                return self.never(Run("collection", training.shards))
            else:
                part = self.given.matrix.benchmarks[run.part]
                self.given.recipe.changed(part.set)
                if not part.run_on(self.given.tasks):
                    return f"none of its tasks is chosen (--tasks): {', '.join(part.tasks)}"
        except UserError as error:
            return one_line(error)
        return None

    def why_not(self, run: Run) -> str | None:
        """Why the run cannot be made now, in one line; None where it can."""
        if reason := self.never(run):
            return reason
        if missing := [source for source in self._sources(run) if not self.is_done(source)]:
            return self._missing(missing[0])
        if run.kind == "audit":
            return None if self.has_answers(run.part) else self._missing(Run("benchmark", run.part))
        if run.kind == "benchmark" and not self.benchmark_recipe(run.part).benchmark.policies:
            return f"none of its policies can be had ({next(iter(self.left_out(run.part).values()))})"
        return None

    def _sources(self, run: Run) -> list[Run]:
        """The collections that a training or another collection takes."""
        if run.kind == "training":
            return [Run("collection", self.given.matrix.trainings[run.part].shards), CALIBRATION]
        calibration = str(self.folder(CALIBRATION).resolve())
        if run.kind == "collection" and self._collecting(run).trigger.calibration == calibration:
            return [CALIBRATION]
        return []

    def _missing(self, run: Run) -> str:
        return self.open.get(run.name) or self.never(run) or f"the {run.name} is not there"

    def make(self, run: Run) -> str:
        """Make it, or finish it; returns a report. Raises UserError."""
        given, folder = self.given, self.folder(run)
        if run.kind == "collection":
            recipe = self._collecting(run)
            return collect.report(collect.collect(recipe, folder, data=given.data), folder)
        if run.kind == "training":
            training = given.matrix.trainings[run.part]
            shards, calibration = (self.folder(source) for source in self._sources(run))
            recipe = self._training_recipe(run.part)
            return train(
                recipe, training.objective, shards, folder, calibration if _scores(training.objective) else None
            )
        if run.kind == "benchmark":
            options = Options(given.data, tracking=given.tracking, unsandboxed=given.unsandboxed)
            return benchmark(self.benchmark_recipe(run.part), folder, options)[0]
        return _audit(folder, self.benchmark_recipe(run.part), given.data)

    def has(self, training: str) -> bool:
        """Whether the recipe itself has what the training would give."""
        recipe = self.given.recipe
        if training == SELECTOR:
            return recipe.artifact is not None
        if training == ROUTER:
            return recipe.router.path is not None
        by_name = isinstance(getattr(recipe, training, None), str)
        return by_name or training in recipe.checkpoints or training in recipe.artifacts

    def benchmark_recipe(self, name: str) -> Recipe:
        """The recipe of a benchmark, with the policies that can be had and what was trained for them."""
        part = self.given.matrix.benchmarks[name]
        left = self.left_out(name)
        return self._asking(part, tuple(one for one in part.policies if one not in left))

    def left_out(self, name: str) -> dict[str, str]:
        """The policies of a benchmark that cannot be had now, and why."""
        part = self.given.matrix.benchmarks[name]
        left: dict[str, str] = {}
        hosting = host(self._asking(part, part.policies))
        for wanted in part.policies:
            training = training_of(wanted) or ""
            if training in self.given.matrix.trainings and not self.has(training) and not self._is_trained(training):
                left[wanted] = self._missing(Run("training", training))
                continue
            try:
                reason = lacking(policy(wanted, hosting), hosting)
            except PolicyError as error:
                unknown = str(error).startswith("no policy named")
                reason = f"no policy {wanted} with this recipe: train it, and name it in the recipe"
                reason = reason if unknown else one_line(error)
            if reason:
                left[wanted] = reason
        return left

    def _items(self, collection: str) -> int:
        return fewer(self.given.items, self.given.matrix.collections[collection].items)

    def _collecting(self, run: Run) -> Recipe:
        part, recipe = self.given.matrix.collections[run.part], self.given.recipe
        if part.of == "calibration":
            recipe = recipe.calibrating()
        elif part.of == "teacher":
            recipe = recipe.by_teacher()
        elif part.of == "tasks":
            rolled = {"task": run.task, "prompts": self._items(run.part) or 10**6, "random_steps": 0.0}
            calibrating = recipe.calibrating()
            recipe = calibrating.model_copy(update={"collect": calibrating.collect.model_copy(update=rolled)})
        return recipe.changed(part.set).calibrated_by(self.folder(CALIBRATION).resolve())

    def _training_recipe(self, name: str) -> Recipe:
        return self.given.recipe.changed(self.given.matrix.trainings[name].set)

    def _is_selector(self, name: str) -> bool:
        """Whether a training is that of the recipe's own artifact, by another name."""
        trainings = self.given.matrix.trainings
        return trainings[name].objective == SELECTOR and self._training_recipe(name) == self.given.recipe

    def _trained(self, name: str) -> Location:
        if self._is_selector(name):
            own = self.given.recipe.artifact
            return location(own) if own else self.given.output / "trainings" / SELECTOR
        return self.given.output / "trainings" / name

    def _is_trained(self, name: str) -> bool:
        if self._is_selector(name) and self.given.recipe.artifact:
            return True
        try:
            known = read_provenance(self._trained(name))
        except UserError:  # what lies there cannot be read, and training it says why
            return False
        objective, recipe = self.given.matrix.trainings[name].objective, self._training_recipe(name)
        return known is not None and (known.objective, known.recipe) == (objective, recipe.digest())

    def _asking(self, part: BenchmarkPart, policies: tuple[str, ...]) -> Recipe:
        given, recipe = self.given, self.given.recipe.changed(part.set)
        asked = {
            "task": part.run_on(given.tasks),
            "items": fewer(given.items, part.items),
            "seeds": part.seeds or recipe.benchmark.seeds,
            "policies": policies,
        }
        products = self._products({one for policy in policies if (one := training_of(policy))}, policies)
        if not recipe.trigger.calibration and not recipe.artifact and self.is_done(CALIBRATION):
            place = str(self.folder(CALIBRATION).resolve())
            products["trigger"] = recipe.trigger.model_copy(update={"calibration": place})
        # Copied and not validated: of a benchmark that cannot be had no policy is left.
        return recipe.model_copy(update={**products, "benchmark": recipe.benchmark.model_copy(update=asked)})

    def _products(self, trainings: set[str], policies: tuple[str, ...]) -> dict[str, object]:
        """The sections of the recipe that name what was trained."""
        recipe = self.given.recipe
        changes: dict[str, object] = {}
        artifacts, checkpoints = dict(recipe.artifacts), dict(recipe.checkpoints)
        for name in sorted(trainings):
            folder = self._product(name)
            if folder is None:
                continue
            if (folder / CARD).is_file():
                if FINE_TUNED + name in policies:
                    checkpoints[FINE_TUNED + name] = str(folder / MODEL)
                if name == SELECTOR:
                    changes["artifact"] = str(folder)
                else:
                    artifacts[name] = str(folder)
            elif (folder / ROUTER_SETTINGS).is_file():
                changes["router"] = recipe.router.model_copy(update={"path": str(folder)})
            elif (folder / CHECKPOINT).is_file():
                checkpoints[name] = str(folder)
            elif name in Recipe.model_fields:  # a product of its own kind, which the recipe has a key for
                changes[name] = str(folder)
        return {**changes, "artifacts": artifacts, "checkpoints": checkpoints}

    def _product(self, name: str) -> Location | None:
        """The folder of what a training gave; None where it is not there, or the recipe names it already."""
        if name == SELECTOR and self.given.recipe.artifact:
            return location(self.given.recipe.artifact)
        if self.has(name) or name not in self.given.matrix.trainings or not self._is_trained(name):
            return None
        return self._trained(name).resolve()


def training_of(name: str) -> str | None:
    """The training that a policy stands on, if it were one of the matrix."""
    found = variant(name)
    if found:
        return (found.artifact or SELECTOR) if found.stem == LOCAL else None
    return ROUTER if name == "r2r" else name.removeprefix(FINE_TUNED)


def fewer(items: int, most: int) -> int:
    """Both bounds on the problems of a task, 0 for none, as one."""
    return min(filter(None, (items, most)), default=0)


def _scores(objective: str) -> bool:
    """Whether an objective makes an artifact, whose thresholds are calibrated."""
    return objective in OBJECTIVES and objectives.objective(objective, DistilSettings()).mark == CARD


def _audit(folder: Location, recipe: Recipe, data: Path | None) -> str:
    """Ask the teacher about a benchmark's answers, and keep them with what it says."""
    frame, metadata = read_results(folder / RESULTS)
    audited = audit(frame, recipe, prompts_of(frame, recipe, data))
    keep(folder, AUDITED, audited, metadata)
    asked = int(audited[TEACHER_ARGMAX].notna().sum())
    return f"asked the teacher about {asked} of {len(audited)} answers of {folder.name}"
