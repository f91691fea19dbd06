"""Learning curves on the embedded pair: accuracy against labelled prompts, of selecting, distilling and both, at equal
teacher cost.

    python -m benchmarks.label_efficiency [--prompts 25,50,100,200,400,800,1600] [--seeds 3] [--jobs 2]
    python -m benchmarks.label_efficiency --prompts 25,100 --systems selector,kd --seeds 1 --items 100 --tasks embedded

One collection is made once, and the points of a seed are trained on prefixes of a permutation of its prompts. A
training of N prompts takes N steps with the recipe's batch of 8 (8 epochs), at most 320 (--set distil.steps=...);
`tsd-kd`, whose every text is read anew, goes over its prompts once. All systems train at one learning rate but
`tsd-kd`, whose rate and weights in the embedded recipe are those of `benchmarks.tsd_kd_sweep`.

With --vary (distil.learning_rate=5e-4,2e-3; for several settings, once each) every system is trained with every
combination, and the table goes by accuracy.

Each point is a process of one thread, without Ray. What is measured is kept in the folder as soon as it is known, so
the same command goes on where it was stopped, and with more --prompts, --systems, --seeds or --tasks it adds to what is
there. It ends with table.md and two figures a task and budget.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2t_models.commands import run_command

if TYPE_CHECKING:
    from benchmarks.label_efficiency.plan import Experiment, Point
    from benchmarks.label_efficiency.work import Job

SIZES = "25,50,100,200,400,800,1600"
SYSTEMS = "selector,kd,selector-rescued,kd-rescued,kd-at-triggers,kd+selector,selector-from-kd,tsd-kd,distil"
TASKS = "embedded,embedded-hard,embedded-held-out"
BUDGETS = "0.02,0.05,0.10"
#: What a measurement takes, and what making the labels takes, in steps of a training.
MEASUREMENT, LABELLING = 25, 300


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    return run_command("label_efficiency", lambda: _curves(options), options.folder)


def _curves(options: argparse.Namespace) -> int:
    """Make the labels, measure the references, then every point, each where it is missing; and draw what there is."""
    from benchmarks.label_efficiency import measuring, report
    from benchmarks.label_efficiency.plan import REFERENCES, Point, points
    from benchmarks.label_efficiency.settings import experiment_of, variations
    from benchmarks.label_efficiency.work import run
    from s2t_models.locks import locked

    experiment = experiment_of(options)
    references = [Point(name) for name in REFERENCES]
    trained = points(options.systems, options.prompts, options.seeds, variations(experiment, options.vary))
    with locked(options.folder):
        failed = run([*_labelling(experiment, trained), *_measuring(experiment, references)], options.jobs)
        if not failed:
            failed = run(_measuring(experiment, trained), options.jobs, measuring.line)
        known = measuring.known(experiment)
        found = {case: known[case] for case in measuring.cases(experiment, [*references, *trained]) if case in known}
        print(report.write(found, options.folder))
    print(f"tables and curves: {options.folder}")
    return 1 if failed else 0


def _labelling(experiment: Experiment, points: Sequence[Point]) -> list[Job]:
    """The pools that the points take and that are not whole yet."""
    from benchmarks.label_efficiency.labels import make_pool, missing, writers
    from benchmarks.label_efficiency.work import Job

    def name(writer: str) -> str:
        return f"texts of the {writer}, labelled"

    # When the teacher rescues is decided by the pool of the SLM.
    return [
        Job(name(writer), make_pool, (experiment, writer), frozenset({name("slm")} - {name(writer)}), LABELLING)
        for writer in writers(experiment, points)
        if missing(experiment, writer)
    ]


def _measuring(experiment: Experiment, points: Sequence[Point]) -> list[Job]:
    """The points of which something is missing, each with the cases that are."""
    from benchmarks.label_efficiency import measuring
    from benchmarks.label_efficiency.work import Job

    known, jobs = measuring.known(experiment), []
    for point in points:
        if missing := [case for case in measuring.cases(experiment, [point]) if case not in known]:
            trains = point.prompts and point.trained == point
            steps = experiment.training(point).distil.steps if trains else 0
            after = frozenset(other.name for other in point.takes)
            size = steps + MEASUREMENT * len(missing)
            jobs.append(Job(point.name, measuring.measure, (experiment, missing), after, size))
    return jobs


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cluster/recipes/embedded.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a setting")
    parser.add_argument(
        "--vary", action="append", default=[], metavar="A.B=V,W", help="train with each of these values of a setting"
    )
    parser.add_argument("--prompts", type=_list(int), default=SIZES, help=f"labelled prompts (default: {SIZES})")
    parser.add_argument("--systems", type=_list(str), default=SYSTEMS, help=f"what is trained (default: {SYSTEMS})")
    parser.add_argument("--seeds", type=int, default=3, help="trainings a point, each on other prompts")
    parser.add_argument("--tasks", type=_list(str), default=TASKS, help=f"what is asked (default: {TASKS})")
    parser.add_argument("--items", type=int, default=300, help="problems of each task")
    parser.add_argument("--budgets", type=_list(float), default=BUDGETS, help=f"of s2t-local (default: {BUDGETS})")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/label-efficiency"))
    return parser.parse_args(argv)


def _list(kind: type) -> Callable[[str], list[Any]]:
    """The type of options that take several values, by commas."""

    def values(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    return values


if __name__ == "__main__":
    sys.exit(main())
