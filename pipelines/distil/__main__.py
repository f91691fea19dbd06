"""`s2t distil`: the options of a training. What it does is in `job`, and for R2R's router in `router_job`."""

from __future__ import annotations

import argparse
import sys

from pipelines.runtime.arguments import add_recipe, place
from s2t_models.commands import run_command
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.storage import Location
from s2t_models.training.objectives import OBJECTIVES

#: Trained by a job of its own: its labels are not those of the shards.
ROUTER = "router"


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        recipe = load_recipe(options.recipe, options.set)
        print(train(recipe, options.objective, options.shards, options.output, options.calibration))

    # Beside the output, which holds nothing but what was trained.
    return run_command("distil", work, options.output.parent)


def train(
    recipe: Recipe, objective: str, shards: Location, output: Location, calibration: Location | None = None
) -> str:
    """Train, or finish training, what the objective says; returns a report. Raises the jobs' own errors (UserError)."""
    if objective == ROUTER:
        from pipelines.distil.router_job import distil_router

        return distil_router(recipe, shards, output)
    from pipelines.distil.job import distil, report

    return report(distil(recipe, shards, output, objective, calibration), output)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="s2t distil", description="Shards to an S2T-Local artifact, a baseline, or R2R's router."
    )
    add_recipe(parser)
    parser.add_argument("--shards", type=place, required=True, help="the collection to train on")
    parser.add_argument(
        "--calibration", type=place, help="a collection to set thresholds on; without one, held-out training prompts"
    )
    parser.add_argument(
        "--output", type=place, required=True, help="the directory of the artifact, checkpoint or router"
    )
    parser.add_argument(
        "--objective", choices=(*OBJECTIVES, ROUTER), default="selector", help="what to train (default: selector)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
