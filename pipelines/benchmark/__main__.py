"""`s2t benchmark`: the options of a benchmark. What it does is in `job`."""

from __future__ import annotations

import argparse
import sys

from pipelines.runtime.arguments import add_recipe, add_tracking, here, place
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> int:
        from pipelines.benchmark.job import Options, benchmark
        from pipelines.data.layout import RESULTS

        recipe = load_recipe(options.recipe, [*options.set, *_overrides(options)])
        tables, seen = benchmark(
            recipe,
            options.output,
            Options(
                here(options.data),
                options.endpoint,
                options.tracking,
                options.repeats,
                options.judge,
                options.judge_model,
                options.allow_unsandboxed,
            ),
        )
        print(f"\n{tables}\nresults: {options.output / RESULTS}\nside by side in MLflow: {seen}")
        return 0

    return run_command("benchmark", work, options.output)


def _overrides(options: argparse.Namespace) -> list[str]:
    """The flags that stand for settings of the recipe, as `--set` would write them."""
    lists = {"task": options.task, "policies": options.policies, "seeds": options.seeds}
    overrides = [f"benchmark.{key}=[{value}]" for key, value in lists.items() if value is not None]
    return overrides + ([f"benchmark.items={options.items}"] if options.items is not None else [])


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t benchmark", description="Benchmark policies over a served endpoint.")
    add_recipe(parser)
    parser.add_argument("--output", required=True, type=place, help="folder for answers, results, tables and figures")
    parser.add_argument("--task", help="benchmarks, separated by commas")
    parser.add_argument("--policies", help="policies, separated by commas, such as greedy,maj@8,s2t@0.05")
    parser.add_argument("--seeds", help="seeds, separated by commas")
    parser.add_argument("--repeats", type=_positive, default=1, help="how often each question is asked with each seed")
    parser.add_argument("--items", type=int, help="rows drawn from each benchmark")
    parser.add_argument("--data", type=place, help="folder with the benchmarks' files; nothing is downloaded then")
    parser.add_argument(
        "--endpoint", metavar="URL", help="an endpoint that is running; by default the recipe is served"
    )
    parser.add_argument("--judge", metavar="URL", help="MT-Bench's judge (default: the endpoint that is benchmarked)")
    parser.add_argument("--judge-model", default="llm", help="the judge's model name (default: llm, the teacher)")
    parser.add_argument(
        "--allow-unsandboxed", action="store_true", help="run model-written code where nothing isolates it"
    )
    add_tracking(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
