"""Runs seeded points and prints a line for each and their table.

    python -m tests.faults --stage collect --points 50 --seed 0
    python -m tests.faults --points 50 --record points.jsonl --seconds 380    # goes on with the points that are missing

It needs root for the full disk (a small tmpfs); that fault is left out where it cannot be mounted.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from .injections import FAULTS, OBJECT_STORE
from .laboratory import Laboratory
from .object_store import ObjectStore
from .points import plan, record, recorded, table
from .raylets import Raylets
from .stages import REPOSITORY, STAGES, prepare


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="s2t-faults-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    journal = options.record or folder / "points.jsonl"
    known = {(point.stage, point.number): point for point in recorded(journal)}
    wanted = plan(options.stage, options.fault, options.points)
    left = [t for t in wanted if any((t.stage.name, number) not in known for number in t.numbers)]
    if not find_spec("moto"):
        left = [trial for trial in left if trial.faults[0].name != OBJECT_STORE]
        print("object store away: left out, the S3 server (moto) is not installed", file=sys.stderr)
    if not can_mount(folder):
        left = [trial for trial in left if trial.faults[0].name != "disk full"]
        print("disk full: left out, a tmpfs cannot be mounted here", file=sys.stderr)
    began = time.monotonic()
    if left:
        prepare(folder / "inputs")
        objects = ObjectStore() if any(trial.faults[0].name == OBJECT_STORE for trial in left) else None
        raylets = Raylets() if any(trial.stage.on_ray for trial in left) else None
        try:
            laboratory, longest = Laboratory(folder, raylets, objects), 0.0
            for trial in left:
                started = time.monotonic()
                if options.seconds and time.monotonic() - began + longest > options.seconds:
                    break
                for point in laboratory.run(trial, options.seed):
                    record(point, journal)
                    known[point.stage, point.number] = point
                    print(point, flush=True)
                longest = max(longest, time.monotonic() - started)
        finally:
            for service in (raylets, objects):
                if service is not None:
                    service.close()
    print(f"\n{table(list(known.values()))}")
    return 1 if any(point.lost or point.differing or point.unclear for point in known.values()) else 0


def can_mount(folder: Path) -> bool:
    """Whether a small tmpfs can be mounted, which a full disk takes."""
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True)
    if mounted.returncode == 0:
        subprocess.run(["umount", place], check=True)
    return mounted.returncode == 0


def _parse() -> argparse.Namespace:
    def some_of(known: Mapping[str, object]) -> Callable[[str], list[str]]:
        def names(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"no {unknown[0]!r}; there are {', '.join(known)}")
            return chosen

        return names

    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--stage", type=some_of(STAGES), default=list(STAGES), help="separated by commas (default: all)"
    )
    parser.add_argument("--fault", type=some_of(FAULTS), default=[], help="with commas (default: the stage's)")
    parser.add_argument("--points", type=int, default=50, help="points a stage (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; what undisturbed runs give is kept there")
    parser.add_argument("--record", type=Path, help="a file of points: those in it are not run again")
    parser.add_argument("--seconds", type=float, help="begin no further point after this time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
