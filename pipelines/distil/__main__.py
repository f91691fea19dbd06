"""`s2t distil`: the options of a training. What it does is in `job`, and for R2R's router in `router_job`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.runtime.arguments import add_recipe
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        recipe = load_recipe(options.recipe, options.set)
        if options.objective == "router":
            from pipelines.distil.router_job import distil_router

            print(distil_router(recipe, options.shards, options.output))
        else:
            from pipelines.distil.job import distil, report

            summary = distil(recipe, options.shards, options.output, options.objective, options.calibration)
            print(report(summary, options.output))

    # Beside the output, which holds nothing but what was trained.
    return run_command("distil", work, options.output.parent)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t distil", description="Shards to an S2T-Local artifact, or to a control.")
    add_recipe(parser)
    parser.add_argument("--shards", type=Path, required=True, help="the collection to train on")
    parser.add_argument(
        "--calibration", type=Path, help="a collection to set thresholds on; without one, held-out training prompts"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the artifact directory, or with kd the checkpoint's"
    )
    parser.add_argument("--objective", choices=("selector", "kd", "router"), default="selector")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
