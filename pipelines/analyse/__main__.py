"""`s2t analyse`: the options of an analysis. What it does is in `job`."""

from __future__ import annotations

import argparse
import sys

from pipelines.analyse import PAGES
from pipelines.runtime.arguments import add_tracking, here, place
from s2t_models.commands import run_command


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    output = options.output or options.inputs[0].parent / "analysis"

    def work() -> None:
        from pipelines.analyse.job import analyse

        print(analyse(options.inputs, output, options.tracking, options.audit, here(options.data), options.pages))
        print(f"tables and figures: {output}")

    return run_command("analyse", work, output)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="s2t analyse", description="The paper's curves and tables from shards or results."
    )
    parser.add_argument(
        "inputs", nargs="+", type=place, metavar="SHARDS|RESULTS", help="a collection, or results files"
    )
    parser.add_argument(
        "--output", type=place, help="folder for tables and figures (default: analysis, beside the input)"
    )
    add_tracking(parser)
    parser.add_argument(
        "--audit",
        action="store_true",
        help="ask the recipe's teacher about the choices of s2t-local, and where answers go wrong",
    )
    parser.add_argument("--data", type=place, help="folder with the benchmarks' files, for --audit and the pages")
    parser.add_argument(
        "--pages",
        type=int,
        default=PAGES,
        metavar="N",
        help="write pages of the first N answers that S2T or S2T-Local got right and greedy decoding wrong, and of the "
        f"first N the other way round, for each task and policy (default: {PAGES})",
    )
    options = parser.parse_args(argv)
    if options.pages < 0:
        parser.error("--pages: give 0 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
