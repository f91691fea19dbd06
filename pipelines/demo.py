"""The loop on the embedded pair: minutes on two cores.

s2t demo                             or: make demo
s2t demo --output runs/again --items 1000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipelines.loop import loop
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe

MEANING = """
What it means: `s2t-local` is the SLM alone, choosing among its own candidates at the steps its trigger head picks.
The budget ({budget:.0%} of steps) was chosen on validation problems, not on these. `takeover` and `s2t` ask the teacher
at the same budget; `llm` is the teacher writing everything. `kd` spends the same labels on plain distillation: the
control that an honest table shows. `s2t-local-w0` is the same artifact choosing by its scores alone, without the SLM's
ranking that it was trained beside. The pair is tiny and was made for this task: the table shows the method at work, and
proves nothing about large models."""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        recipe = load_recipe("embedded", [*options.set, f"benchmark.items={options.items}"])
        print(MEANING.format(budget=loop(recipe, options.output).budget))

    return run_command("demo", work, options.output)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t demo", description="The whole loop on the embedded pair.")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--items", type=int, default=500, help="test problems (500 or more for a firm answer)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
