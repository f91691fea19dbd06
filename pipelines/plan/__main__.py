"""The command line: what a recipe needs, before a machine is rented for it.

    s2t plan qwen2.5-coder-0.5b-1.5b
    s2t plan recipe.yaml --card l40s --set distil.micro_batch=2048 --objective tsd-kd

Of a model only its configuration is read, from the hub or a folder that holds no more than config.json. The status is 1
where a stage does not fit.
"""

from __future__ import annotations

import argparse
import sys

from s2t_models.commands import run_command
from s2t_models.errors import UserError
from s2t_models.recipe import load_recipe


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> int:
        from pipelines.plan.card import card
        from pipelines.plan.report import report
        from pipelines.plan.stages import TRAININGS, Assumed, Plan

        recipe = load_recipe(options.recipe, options.set)
        if options.prompt_tokens < 1 or not 0 < options.answer_share <= 1:
            raise UserError("--prompt-tokens is 1 or more, --answer-share above 0 and at most 1")
        name = options.card or ("cpu" if {recipe.slm.device, recipe.teacher.device} == {"cpu"} else "h100")
        chosen = card(name, options.memory, options.tflops, options.bandwidth)
        assumed = Assumed(options.prompt_tokens, options.answer_share)
        plan = Plan(recipe, chosen, assumed, options.objective or TRAININGS)
        text, fits = report(plan)
        print(text)
        return 0 if fits else 1

    return run_command("plan", work, resumes=False)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="s2t plan", description="Memory, arithmetic, hours, disk and teacher tokens of a recipe, stage by stage."
    )
    parser.add_argument("recipe", help="a recipe's YAML file, or a shipped name")
    parser.add_argument(
        "--objective",
        action="append",
        metavar="NAME",
        help="a training to plan, as `s2t distil --objective` names it; more of them by more options (selector, kd)",
    )
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument(
        "--card", help="h200, h100, a100, l40s or cpu (default: cpu where both models are on it, else h100)"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of the card, or of the machine")
    parser.add_argument("--tflops", type=float, help="its peak TFLOP/s in half precision")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="its peak memory bandwidth")
    parser.add_argument("--prompt-tokens", type=int, default=150, metavar="N", help="mean tokens of a prompt (150)")
    parser.add_argument(
        "--answer-share", type=float, default=0.6, metavar="X", help="mean answer as a share of its limit (0.6)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
