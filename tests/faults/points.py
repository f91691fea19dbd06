"""A point: one run of a stage with one fault at a moment drawn from the seed, and what was lost by it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from s2t_models.storage import Location, StorageError

from .injections import FAULTS, OBJECT_STORE, OF_STAGE, Fault, Scene
from .object_store import ObjectStore
from .raylets import Raylets
from .stages import INTERVAL, STAGES, Loss, Stage

#: Longest run, and how often the command is run again.
PATIENCE_S = 240.0
RERUNS = 3
#: The moment of a fault that came too late.
MISSED = "none: it had ended before"
#: What a benchmark says where it ended well but for questions that got no answer.
UNANSWERED = "the same command asks again"
#: A disturbed run may take that many times as long before its fault comes.
SLACK = 3.0


@dataclass(frozen=True)
class Point:
    """What became of a point. `line` is the last that the first run said where it ended with an error; `unclear` counts
    lines that do not say what to do; `reruns` are those of the same command."""

    stage: str
    fault: str
    number: int
    moment: str
    struck: str
    lost: int
    differing: int
    unclear: int
    reruns: int
    seconds: float
    line: str

    def __str__(self) -> str:
        lost = f"lost {self.lost}, differing {self.differing}, reruns {self.reruns}, {self.seconds:.0f} s"
        said = f": {self.line}" if self.line else ""
        return f"{self.stage} #{self.number} {self.fault} ({self.struck or '-'}) at {self.moment}: {lost}{said}"


@dataclass(frozen=True)
class Undisturbed:
    """An output to compare with, the seconds it took, and the most that was on the disk, bytes."""

    output: Path
    seconds: float
    peak: int


class Laboratory:
    """Runs points in `folder`, where what an undisturbed run gives is kept for the next time. Stages that are not on
    Ray do without `raylets`."""

    def __init__(self, folder: Path, raylets: Raylets | None, objects: ObjectStore | None = None) -> None:
        self.folder, self.raylets, self.objects = folder, raylets, objects
        self.inputs = folder / "inputs"
        self.said = folder / "stderr"

    def undisturbed(self, stage: Stage) -> Undisturbed:
        """Run the stage by itself, once."""
        place, record = self.folder / "undisturbed" / stage.name, self.folder / "undisturbed" / f"{stage.name}.json"
        if not record.is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            began, peak = time.monotonic(), 0
            driver = self._start(stage, self.inputs, place / "out", {})
            while driver.poll() is None:
                peak = max(peak, _bytes_below(place))
                time.sleep(0.05)
            seconds = time.monotonic() - began
            if driver.returncode != 0:
                raise RuntimeError(f"{stage.name} fails by itself: {self._last_line()}")
            record.write_text(json.dumps({"seconds": seconds, "peak": max(peak, _bytes_below(place))}))
        return Undisturbed(place / "out", **json.loads(record.read_text()))

    def run(self, stage: Stage, fault: Fault, number: int, seed: int) -> Point:
        """One point. The output of a point without a loss is deleted."""
        expected = self.undisturbed(stage)
        draw = random.Random(f"{seed} {stage.name} {fault.name} {number}")
        folder = self.folder / "points" / f"{stage.name}-{number:03d}".replace(" ", "-")
        for old in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        scene = Scene(stage, self.raylets, self.inputs, folder, draw, expected.peak)
        if fault.name == OBJECT_STORE:
            scene.objects = self.objects
        began = time.monotonic()
        try:
            fault.before(scene)
            scene.driver = self._start(stage, scene.inputs, scene.output, scene.environment)
            moment, seen = self._strike(scene, fault, expected.seconds) if fault.has_moment else ("its place", 0)
            status, line = self._end(scene.driver)
            fault.after(scene)
            unclear = int(status not in (0, -9) and not _is_clear(line, fault))
            reruns, again, later = 0, status, line
            while reruns < RERUNS and (again != 0 or (fault.again and not reruns) or UNANSWERED in later):
                again, later = self._end(self._start(stage, scene.inputs, scene.output, scene.environment, fault.then))
                reruns += 1
                line = line or later
            loss = self._loss(scene, expected, again, seen)
        finally:
            for undo in reversed(scene.undo):
                undo()
            if self.raylets is not None:
                self.raylets.restore()
        point = Point(
            stage.name, fault.name, number, moment, scene.struck, loss.lost, loss.differing, unclear, reruns,
            round(time.monotonic() - began, 1), line if status != 0 else "",
        )  # fmt: skip
        if not (point.lost or point.differing):
            for done in folder.parent.glob(f"{folder.name}*"):
                shutil.rmtree(done)
        return point

    def _strike(self, scene: Scene, fault: Fault, seconds: float) -> tuple[str, int]:
        """Wait for the moment and let the fault strike; says when that was, and how much was done by then. The moment
        is a share of the time that an undisturbed run takes, or of its progress."""
        share = scene.draw.uniform(0.02, 0.98)
        by_progress = scene.draw.random() < 0.5
        stage, driver = scene.stage, scene.driver
        assert driver is not None
        began = time.monotonic()
        while driver.poll() is None:
            passed, done = time.monotonic() - began, _progress(stage, scene.output)
            if passed > SLACK * seconds or (done >= share * stage.total if by_progress else passed >= share * seconds):
                fault.strike(scene)
                return MISSED if scene.was_missed else f"{passed:.1f} s, {done} of {stage.total}", done
            time.sleep(0.02)
        return MISSED, 0

    def _loss(self, scene: Scene, expected: Undisturbed, status: int | None, seen: int) -> Loss:
        if status != 0:
            return Loss(scene.stage.total, 0)
        loss = scene.stage.loss(scene.output, expected.output)
        if scene.stage.begun is not None:
            restarts = scene.stage.begun(scene.output)[1:]
            repeated = max(seen - restarts[0] - INTERVAL, 0) if restarts else 0
            loss = Loss(loss.lost + repeated, loss.differing)
        if scene.tracking is not None and not scene.tracking.finished_runs():
            loss = Loss(loss.lost + 1, loss.differing)
        return loss

    def _start(
        self, stage: Stage, inputs: Path, output: Location, environment: dict[str, str], then: tuple[str, ...] = ()
    ) -> subprocess.Popen[bytes]:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.folder}/mlflow.db"}
        if self.raylets is not None:
            store["RAY_ADDRESS"] = self.raylets.address
        with self.said.open("w") as said:
            return subprocess.Popen(
                [*stage.command(inputs, output), *then],
                cwd=self.folder,
                env=os.environ | store | environment,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def _end(self, driver: subprocess.Popen[bytes]) -> tuple[int | None, str]:
        """Its status, None where it does not end, and the last line it said."""
        try:
            driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            return None, f"does not end; {self._last_line()}"
        return driver.returncode, self._last_line()

    def _last_line(self) -> str:
        lines = [line for line in self.said.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""


def plan(stages: list[str], faults: list[str], count: int) -> list[tuple[Stage, Fault, int]]:
    """`count` points a stage, stages and their faults in turn; those of `faults` alone where any are given."""
    own = {name: [fault for fault in OF_STAGE[name] if not faults or fault in faults] for name in stages}
    return [
        (STAGES[name], FAULTS[chosen[number % len(chosen)]], number)
        for number in range(count)
        for name, chosen in own.items()
        if chosen
    ]


def table(points: list[Point]) -> str:
    """The points by stage and fault, as Markdown; those whose run had ended before the fault came are left out."""
    points = [point for point in points if point.moment != MISSED]
    columns = ("stage", "fault", "points", "lost rows", "differing rows", "unclear errors", "reruns")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * 5]
    for stage, fault in sorted({(point.stage, point.fault) for point in points}):
        own = [point for point in points if (point.stage, point.fault) == (stage, fault)]
        sums = (sum(getattr(point, name) for point in own) for name in ("lost", "differing", "unclear", "reruns"))
        lines.append(f"| {' | '.join(map(str, (stage, fault, len(own), *sums)))} |")
    return "\n".join(lines)


def record(point: Point, path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(point)) + "\n")


def recorded(path: Path) -> list[Point]:
    return [Point(**json.loads(line)) for line in path.read_text().splitlines()] if path.is_file() else []


def _progress(stage: Stage, output: Location) -> int:
    """0 where files come and go under the look."""
    try:
        return stage.progress(output)
    except (OSError, ValueError, StorageError):
        return 0


def _is_clear(line: str, fault: Fault) -> bool:
    """Whether it is a line of ours that says what the user can do."""
    return "unexpected" not in line and ": " in line and fault.says in line and "Traceback" not in line


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 4096 * -(-path.stat().st_size // 4096)
        except OSError:  # it has gone meanwhile
            continue
    return total
