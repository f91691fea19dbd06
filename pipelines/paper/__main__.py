"""`s2t paper`: the options of the paper's tables. What it does is in `job`."""

from __future__ import annotations

import argparse
import sys

from pipelines.runtime.arguments import add_recipe, add_tracking, here, place
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> int:
        from pipelines.paper.job import collections_beside, given, listing, paper

        recipe = load_recipe(options.recipe, options.set)
        collections = collections_beside(options.recipe)
        collections |= {"train": options.shards} if options.shards else {}
        collections |= {"calibration": options.calibration} if options.calibration else {}
        job = given(
            recipe,
            options.output,
            matrix=options.matrix,
            tasks=_names(options.tasks),
            items=options.items,
            data=here(options.data),
            tracking=options.tracking,
            collections=collections,
            unsandboxed=options.allow_unsandboxed,
        )
        if options.list:
            print(listing(job, _names(options.only)))
            return 0
        return paper(job, _names(options.only), not options.no_runs)

    return run_command("paper", work, options.output)


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()


def _at_least_none(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return number


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="s2t paper", description="Every table and figure of the paper for one recipe, from the runs of a matrix."
    )
    add_recipe(parser)
    parser.add_argument("--output", required=True, type=place, help="folder of all runs, tables and figures")
    parser.add_argument("--matrix", type=place, help="what runs, a YAML file (default: the one that ships)")
    parser.add_argument("--tasks", help="benchmarks, separated by commas (default: the recipe's)")
    parser.add_argument("--items", type=_at_least_none, help="problems of each, 0 for all (default: the recipe's)")
    parser.add_argument(
        "--only", metavar="TABLE,...", help="tables and figures, such as 1,A3,figure-4: only their runs"
    )
    parser.add_argument(
        "--list", action="store_true", help="say what there is to run and what is done, and run nothing"
    )
    parser.add_argument("--no-runs", action="store_true", help="run nothing, and write what the runs that are done say")
    parser.add_argument(
        "--shards", type=place, help="a training collection that is there (default: `train` beside a loop's recipe)"
    )
    parser.add_argument(
        "--calibration", type=place, help="one to set thresholds on (default: `calibration` beside a loop's recipe)"
    )
    parser.add_argument("--data", type=place, help="folder with the benchmarks' files; nothing is downloaded then")
    parser.add_argument(
        "--allow-unsandboxed", action="store_true", help="run model-written code where nothing isolates it"
    )
    add_tracking(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
