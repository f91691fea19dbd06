"""`s2t collect`: the options of a collection. What it does is in `job`."""

from __future__ import annotations

import argparse
import sys

from pipelines.runtime.arguments import add_recipe, here, place
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        from pipelines.collect.job import collect, report

        recipe = load_recipe(options.recipe, options.set + ([f"collect.task={options.task}"] if options.task else []))
        if options.calibration:
            recipe = recipe.calibrating()
        if options.teacher:
            recipe = recipe.by_teacher()
        print(report(collect(recipe, options.output, options.prompts, here(options.data)), options.output))

    return run_command("collect", work, options.output)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="s2t collect", description="Prompts to SLM rollouts, teacher labels and shards."
    )
    add_recipe(parser)
    parser.add_argument(
        "--output", type=place, required=True, help="folder of the collection: a path that all nodes share, or a URI"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--task", help="where prompts come from, in place of the recipe's collect.task")
    source.add_argument(
        "--prompts", type=place, help='JSON lines of {"uid", "prompt"} or {"uid", "messages"}; all are used'
    )
    source.add_argument(
        "--calibration", action="store_true", help="the recipe's calibration prompts, rolled out greedily"
    )
    parser.add_argument(
        "--teacher", action="store_true", help="the teacher's own answers, for `s2t distil --objective distil`"
    )
    parser.add_argument("--data", type=place, help="folder of benchmark data, for tasks that read files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
