"""Accuracy at each budget: Takeover and S2T, which ask the teacher, and S2T-Local, which does not, on the same
problems.

    python -m benchmarks.budgets --recipe runs/demo/recipe.yaml [--items 500] [--budgets 0.01 0.05 0.10 0.20]

It is a benchmark job like any other: it serves what it needs, can be killed and run again, and leaves results, tables
and figures in its output folder. The table shows accuracy in percent with its 95% interval, and the teacher's tokens
per answer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.benchmark.job import Options, benchmark
from pipelines.data.layout import RESULTS
from pipelines.results.summary import Summary, markdown_table, read_results, summarise
from s2t_models.commands import run_command
from s2t_models.recipe import Recipe, load_recipe

POLICIES = ("takeover", "s2t", "s2t-local")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a recipe with its artifact, such as the demo's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--task", default="embedded")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files; nothing is downloaded then")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.05, 0.10, 0.20])
    parser.add_argument("--output", type=Path, default=Path("runs/budgets"))
    options = parser.parse_args(argv)

    def work() -> None:
        settings = [f"benchmark.task=[{options.task}]", f"benchmark.items={options.items}"]
        recipe = _at(load_recipe(options.recipe, [*options.set, *settings]), options.budgets)
        benchmark(recipe, options.output, Options(data=options.data))
        summaries = summarise(read_results(options.output / RESULTS)[0])
        print(f"\n{options.task}, {summaries[0].items} items\n\n{table(summaries, options.budgets)}")

    return run_command("budgets", work, options.output)


def _at(recipe: Recipe, budgets: list[float]) -> Recipe:
    """The recipe with every policy at every budget as its benchmark."""
    names = tuple(f"{policy}@{budget:g}" for policy in POLICIES for budget in budgets)
    return recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"policies": names})})


def table(summaries: list[Summary], budgets: list[float]) -> str:
    """Two rows per policy, one column per budget, as Markdown."""
    found = {summary.policy: summary for summary in summaries}
    rows = []
    for policy in POLICIES:
        cells = [found[f"{policy}@{budget:g}"] for budget in budgets]
        rows.append([policy, *(f"{100 * s.accuracy:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]" for s in cells)])
        rows.append(["- teacher tokens", *(f"{s.teacher_prefill + s.teacher_decode:.0f}" for s in cells)])
    return markdown_table(["policy", *(f"{budget:g}" for budget in budgets)], rows)


if __name__ == "__main__":
    sys.exit(main())
