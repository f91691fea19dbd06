"""From the options to an experiment: what is asked for is checked here, before anything is made."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Sequence

from benchmarks.label_efficiency.measuring import questions
from benchmarks.label_efficiency.plan import SYSTEMS, Experiment, Point
from pipelines.benchmark.questions import check_splits
from s2t_models import loading
from s2t_models.calibration import BUDGETS
from s2t_models.errors import UserError
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.storage import write_json

#: More prompts than the demo has.
PROMPTS = "collect.prompts=1600"
#: Prompts of the pool beyond those that are labelled at most, one in so many: the teacher's texts may be shorter.
SPARE = 8
#: The file that says whose points a folder holds.
RECORD = "experiment.json"


class ExperimentError(UserError):
    """Curves that cannot be measured; the message is one line."""


def experiment_of(options: argparse.Namespace) -> Experiment:
    """Raises RecipeError, TaskError for an unknown task, QuestionError where a problem that is asked is trained on, and
    ExperimentError for any other option that cannot be had, or a folder that holds another experiment."""
    recipe = load_recipe(options.recipe, [PROMPTS, *options.set])
    if unknown := [name for name in options.systems if name not in SYSTEMS]:
        raise ExperimentError(f"--systems: there is no {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
    known = sorted({*BUDGETS, recipe.budget})
    if unknown := [budget for budget in options.budgets if budget not in known]:
        raise ExperimentError(f"--budgets: {unknown[0]:g} is not calibrated; there are {', '.join(map(str, known))}")
    labelled = recipe.collect.prompts
    if not 2 <= min(options.prompts) <= max(options.prompts) <= labelled:
        raise ExperimentError(f"--prompts: give from 2 to {labelled}, which is collect.prompts of the recipe")
    if min(options.seeds, options.items, options.jobs) < 1:
        raise ExperimentError("--seeds, --items, --jobs: give 1 or more")
    recipe = recipe.changed(
        {
            "collect.prompts": labelled + labelled // SPARE,
            "benchmark.task": options.tasks,
            "benchmark.items": options.items,
        }
    )
    experiment = Experiment(recipe, options.folder, tuple(options.budgets))
    variations(experiment, options.vary)
    check_splits(recipe, questions(experiment), None)
    _claim(experiment)
    return experiment


def variations(experiment: Experiment, varied: Sequence[str]) -> list[str]:
    """Every combination of the values of `--vary`, as `Point.settings`; of none, one without any. Raises
    ExperimentError, and RecipeError for a setting or value that there is not."""
    for one in varied:
        if not re.fullmatch(r"distil\.[^=\s]+=[^=\s]+", one):
            raise ExperimentError(f"--vary {one}: give a setting of distil with its values, as distil.beta=10,20")
    values = [[f"{key}={value}" for value in of.split(",")] for key, of in (one.split("=") for one in varied)]
    found = [" ".join(settings) for settings in itertools.product(*values)]
    for settings in found:
        experiment.recipe_of(Point("", settings=settings))
    return found


def _claim(experiment: Experiment) -> None:
    """Note what decides the trainings of the folder, or check that it is the same."""
    path, mine = experiment.folder / RECORD, _deciding(experiment.recipe)
    if not path.is_file():
        experiment.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)
    there = json.loads(path.read_text())
    if different := [key for key, value in mine.items() if there.get(key) != value]:
        raise ExperimentError(
            f"{experiment.folder}: holds points of other settings ({', '.join(different)}); give the same ones to go "
            "on with them, or another --folder"
        )


def _deciding(recipe: Recipe) -> dict[str, object]:
    whole = json.loads(recipe.model_dump_json(exclude={"benchmark", "serving", "validation"}))
    weights = {f"{name} weights": loading.weights_hash(getattr(recipe, name)) for name in ("slm", "teacher")}
    return whole | weights
