"""The points of the curves: what is trained on how many labels with which seed, in which order, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from s2t_models.artifact import CARD
from s2t_models.hosting import LOCAL
from s2t_models.recipe import Recipe
from s2t_models.training.objectives import objective
from s2t_models.training.objectives.base import Objective

#: Prompts that are held out of the labelled ones at the least: thresholds are percentiles of their steps.
HELD_OUT = 4
#: Times that a training goes over its labels, unless `distil.steps` ends it before. As many at every number of labels:
#: with a floor of 80 steps `kd` goes thirty times over 21 texts, and solves fewer problems for it.
EPOCHS = 8


@dataclass(frozen=True)
class System:
    """What is trained: an objective, and what it takes from a `kd` model of the same labels. "model": that model is the
    base of the selector and gives its prior. It trains on the labels all the same: its texts, critical steps and
    candidates stay those of the recipe's SLM, for new ones would cost the teacher as much again; at decoding they are
    its own. "lora": the selector's LoRA begins as that of `kd`, over the recipe's SLM.
    "choice": nothing more is trained. The `selector` of the same labels writes, triggers and proposes, and the text
    logits of `kd` choose among its candidates, at triggered steps alone.
    `rescued`: the labels are of texts that S2T wrote to the same prompts (`collect.writer`)."""

    objective: str
    from_kd: Literal["model", "lora", "choice"] | None = None
    rescued: bool = False


SELECTOR, KD = "selector", "kd"
SYSTEMS = {
    SELECTOR: System(SELECTOR),
    KD: System(KD),
    "selector-rescued": System(SELECTOR, rescued=True),
    "kd-rescued": System(KD, rescued=True),
    "kd-at-triggers": System(SELECTOR, "choice"),
    "kd+selector": System(SELECTOR, "model"),
    "selector-from-kd": System(SELECTOR, "lora"),
    "tsd-kd": System("tsd-kd"),
    "distil": System("distil"),
}
#: What is not trained, and the policy it answers with.
REFERENCES = {"base": "greedy", "teacher": "llm"}


@dataclass(frozen=True)
class Point:
    """One training; of a reference, none. `settings` (`A.B=VALUE A.C=VALUE`) are those in which it departs from the
    experiment's recipe."""

    system: str
    prompts: int = 0
    seed: int = 0
    settings: str = ""

    @property
    def name(self) -> str:
        return "-".join([self.system, str(self.prompts), str(self.seed), *self.settings.split()])

    @property
    def from_kd(self) -> str | None:
        """What it takes from a `kd` model (see `System`)."""
        return SYSTEMS[self.system].from_kd if self.system in SYSTEMS else None

    @property
    def kd(self) -> Point | None:
        """The training of `kd` that this one takes up."""
        return replace(self, system=KD) if self.from_kd else None

    @property
    def trained(self) -> Point:
        """The training that it decodes with: its own, but for `kd-at-triggers` that of the selector."""
        return replace(self, system=SELECTOR) if self.from_kd == "choice" else self

    @property
    def takes(self) -> list[Point]:
        """The other trainings that it takes up, which have to end first."""
        return [one for one in (self.kd, self.trained) if one and one != self]


@dataclass(frozen=True)
class Experiment:
    """What all points share. The recipe says how many prompts are collected (`collect.prompts`), and which items are
    asked (`benchmark`)."""

    recipe: Recipe
    folder: Path
    budgets: tuple[float, ...]

    def recipe_of(self, point: Point) -> Recipe:
        """The recipe with the point's own settings. Raises RecipeError where they are none."""
        return self.recipe.changed(dict(setting.split("=", 1) for setting in point.settings.split()))

    def place(self, point: Point) -> Path:
        """The folder of the training that the point decodes with."""
        return self.folder / "trained" / point.trained.name

    def model(self, point: Point) -> Path:
        """The folder of what was trained, an artifact or a checkpoint."""
        return self.place(point) / "model"

    def objective(self, point: Point) -> Objective:
        return objective(SYSTEMS[point.system].objective, self.recipe.distil)

    def selects(self, point: Point) -> bool:
        """Whether an artifact comes of the training, and not a plain checkpoint."""
        return self.objective(point).mark == CARD

    def policies(self, point: Point) -> list[str]:
        """The policies that the point is measured with."""
        if point.system in REFERENCES:
            return [REFERENCES[point.system]]
        if self.selects(point):
            # Where `kd` chooses, it alone does: no prior is added.
            stem = f"{LOCAL}-w0" if point.from_kd == "choice" else LOCAL
            return [f"{stem}@{budget:g}" for budget in self.budgets]
        return [SYSTEMS[point.system].objective]

    def training(self, point: Point) -> Recipe:
        """The recipe that the point is trained with."""
        recipe = self.recipe_of(point)
        distil = recipe.distil
        share = max(distil.validation, min(HELD_OUT / point.prompts, 0.5))
        steps = self.steps(point, share)
        changes = {"steps": steps, "validation": share, "evaluate_every": max(steps // 4, 1), "workers": 1}
        seed = self.recipe.seed + point.seed
        return recipe.model_copy(update={"seed": seed, "distil": distil.model_copy(update=changes)})

    def steps(self, point: Point, held_out: float) -> int:
        """How long a point is trained: EPOCHS times over its labels, at most `distil.steps`. Where the teacher reads
        every text as it is written, once over its prompts: that costs as much as the labels of the others."""
        distil = self.recipe_of(point).distil
        if self.objective(point).on_policy:
            return max(round((1 - held_out) * point.prompts / distil.batch), 1)
        return min(max(EPOCHS * point.prompts // distil.batch, 1), distil.steps)


def points(systems: Sequence[str], sizes: Sequence[int], seeds: int, settings: Sequence[str] = ("",)) -> list[Point]:
    """All points, seed by seed, so that whole curves come early; each behind what it takes up."""
    wanted = [
        Point(system, size, seed, varied)
        for seed in range(seeds)
        for size in sorted(sizes)
        for varied in settings
        for system in sorted(systems, key=_is_later)
    ]
    return list(dict.fromkeys(point for one in wanted for point in (*one.takes, one)))


def _is_later(system: str) -> bool:
    return SYSTEMS[system].from_kd is not None
