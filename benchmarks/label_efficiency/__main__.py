"""Learning curves on the embedded pair: accuracy against labelled prompts, of selecting, distilling and both, at equal
teacher cost.

    python -m benchmarks.label_efficiency [--prompts 25,50,100,200,400,800,1600] [--seeds 3] [--jobs 2]
    python -m benchmarks.label_efficiency --prompts 25,100 --systems selector,kd --seeds 1 --items 100 --tasks embedded

One collection is made once, and the points of a seed are trained on prefixes of a permutation of its prompts. A
training of N prompts takes N steps with the recipe's batch of 8 (8 epochs), at least --least-steps and at most the
recipe's `distil.steps`; `tsd-kd`, whose every text is read anew, goes over its prompts once. All systems train at the
recipe's learning rate: the published rates of `distil` and `tsd-kd` are for models a thousand times as big (`--set
distil.tsd_kd.learning_rate=...` sets another).

Each point is a process of one thread, without Ray. What is measured is kept in the folder as soon as it is known, so
the same command goes on where it was stopped, and with more --prompts, --systems, --seeds or --tasks it adds to what is
there. It ends with table.md and a figure a task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from s2t_models.commands import run_command

SIZES = "25,50,100,200,400,800,1600"
SYSTEMS = "selector,kd,kd+selector,selector-from-kd,tsd-kd,distil"
TASKS = "embedded,embedded-hard,embedded-held-out"
BUDGETS = "0.02,0.05,0.10"
#: What a measurement takes, in steps of a training.
STEPS_A_MEASUREMENT = 25
#: What a pool takes, in the same.
LONG = 300


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)

    def work() -> int:
        return _curves(options)

    return run_command("label_efficiency", work, options.folder)


def _curves(options: argparse.Namespace) -> int:
    """Make the labels, measure the references and then every point that is missing, and draw what there is."""
    from benchmarks.label_efficiency import labels, measuring, plan, report
    from benchmarks.label_efficiency.settings import experiment_of
    from benchmarks.label_efficiency.work import Job, run
    from s2t_models.locks import locked

    experiment = experiment_of(options)
    with locked(options.folder):
        first = [plan.Point(name) for name in plan.REFERENCES]
        points = plan.points(options.systems, options.prompts, options.seeds)

        def missing(of: list[plan.Point]) -> list[Job]:
            known, found = measuring.known(experiment), []
            for point in of:
                if cases := [case for case in measuring.cases(experiment, [point]) if case not in known]:
                    size = experiment.training(point).distil.steps if point.prompts else 0
                    after = frozenset({point.kd.name} if point.kd else ())
                    size += STEPS_A_MEASUREMENT * len(cases)
                    found.append(Job(point.name, measuring.measure, (experiment, cases), after, size))
            return found

        pools = [
            Job(f"texts of the {writer}, labelled", labels.make_pool, (experiment, writer), size=LONG)
            for writer in labels.WRITERS
            if labels.missing(experiment, writer)
        ]
        failed = run([*pools, *missing(first)], options.jobs) or run(missing(points), options.jobs, measuring.line)
        wanted = measuring.cases(experiment, [*first, *points])
        found = measuring.known(experiment)
        print(report.write({case: found[case] for case in wanted if case in found}, options.folder))
        print(f"tables and curves: {options.folder}")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cluster/recipes/embedded.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument("--prompts", type=_list(int), default=SIZES, help=f"labelled prompts (default: {SIZES})")
    parser.add_argument("--systems", type=_list(str), default=SYSTEMS, help=f"what is trained (default: {SYSTEMS})")
    parser.add_argument("--seeds", type=int, default=3, help="trainings a point, each on other prompts")
    parser.add_argument("--tasks", type=_list(str), default=TASKS, help=f"what is asked (default: {TASKS})")
    parser.add_argument("--items", type=int, default=300, help="problems of each task")
    parser.add_argument("--budgets", type=_list(float), default=BUDGETS, help=f"of s2t-local (default: {BUDGETS})")
    parser.add_argument("--least-steps", type=int, default=80, help="of a training")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/label-efficiency"))
    return parser.parse_args(argv)


def _list(kind: type) -> object:
    return lambda text: [kind(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
