"""`s2t export ARTIFACT OUT`: an artifact as a folder that transformers, peft and others load.

    s2t export runs/demo/artifact runs/demo/exported --recipe runs/demo/recipe.yaml \\
        --results runs/demo/benchmark/results.parquet
"""

from __future__ import annotations

import argparse
import sys

from pipelines.runtime.arguments import place
from s2t_models.commands import run_command
from s2t_models.recipe import load_recipe
from s2t_models.settings import CandidateSettings, TriggerSettings
from s2t_models.storage import Location


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)

    def work() -> None:
        from s2t_models.artifact import Artifact
        from s2t_models.export.package import Decoding, export
        from s2t_models.hosting import check_decoding
        from s2t_models.policies.triggers import fixed_threshold

        artifact = Artifact.load(options.artifact)
        recipe = load_recipe(options.recipe, options.set) if options.recipe else None
        if recipe:
            check_decoding(artifact, recipe)
        trained_for = recipe.budget if recipe else artifact.card.provenance.settings.get("budget", 0.01)
        decoding = Decoding(
            candidates=recipe.candidates if recipe else CandidateSettings(),
            warmup=recipe.trigger.warmup if recipe else TriggerSettings().warmup,
            budget=trained_for if options.budget is None else options.budget,
            threshold=fixed_threshold("head", recipe) if recipe and options.budget is None else None,
        )
        export(artifact, options.output, decoding, _measured(options.results) if options.results else None)
        triggers = f"budget {decoding.budget:g}" if decoding.threshold is None else "the recipe's fixed threshold"
        print(f"exported     {options.artifact}, {triggers}\nwritten to   {options.output}")

    return run_command("export", work, resumes=False)


def _measured(results: Location) -> str:
    from pipelines.results.summary import comparisons, markdown, read_results, summarise

    frame, metadata = read_results(results)
    return markdown(summarise(frame, metadata), comparisons(frame)[0]).strip()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="s2t export", description="An artifact for transformers, peft and others.")
    parser.add_argument("artifact", type=place, help="folder of a trained S2T-Local model")
    parser.add_argument("output", type=place, help="folder to write")
    parser.add_argument("--recipe", help="where candidates, warm-up and budget come from; else the defaults")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--budget", type=float, help="the budget it decodes with by default")
    parser.add_argument("--results", type=place, help="results.parquet of a benchmark, for the model card")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
