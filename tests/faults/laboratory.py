"""Runs a stage under the faults of a trial, and compares what it gives with what an undisturbed run gave."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from s2t_models.storage import Location, StorageError

from .injections import OBJECT_STORE, Fault, Scene
from .object_store import ObjectStore
from .points import MISSED, Point, Trial
from .raylets import Raylets
from .stages import MADE_AGAIN, Loss, Stage

#: Longest run, and how often the command is run again for each fault.
PATIENCE_S = 600.0
RERUNS = 3
#: What a benchmark says where it ended well but for questions that got no answer.
UNANSWERED = "the same command asks again"
#: A fault that waits for some progress comes after this many times the undisturbed run's seconds all the same.
SLACK = 2.0
#: How often a run is looked at.
EVERY_S = 0.1


@dataclass(frozen=True)
class Undisturbed:
    """An output to compare with, the seconds it took, and the most that was on the disk, bytes."""

    output: Path
    seconds: float
    peak: int


class Laboratory:
    """Runs trials in `folder`, where what an undisturbed run gives is kept for the next time. Stages that are not on
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
            driver = self.start(stage, self.inputs, place / "out", {})
            while driver.poll() is None:
                peak = max(peak, _bytes_below(place))
                time.sleep(0.05)
            seconds = time.monotonic() - began
            if driver.returncode != 0:
                raise RuntimeError(f"{stage.name} fails by itself: {self.last_line()}")
            record.write_text(json.dumps({"seconds": seconds, "peak": max(peak, _bytes_below(place))}))
        return Undisturbed(place / "out", **json.loads(record.read_text()))

    def run(self, trial: Trial, seed: int) -> list[Point]:
        """One run with all faults of a trial, in an order drawn from the seed. The output of a run without a loss is
        deleted."""
        stage, first = trial.stage, trial.numbers[0]
        expected = self.undisturbed(stage)
        draw = random.Random(f"{seed} {stage.name} {first}")
        folder = self.folder / "points" / f"{stage.name}-{first:03d}".replace(" ", "-")
        for old in folder.parent.glob(f"{folder.name}*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        scene = Scene(stage, self.raylets, self.inputs, folder, draw, expected.peak)
        if trial.faults[0].name == OBJECT_STORE:
            scene.objects = self.objects
        order = [*zip(trial.faults, trial.numbers, strict=True)]
        draw.shuffle(order)
        order.sort(key=lambda pair: pair[0].has_moment)  # what is there from the beginning comes first
        shares = sorted(draw.uniform(0.02, 0.98) for _ in order)
        points, loss = list[Point](), Loss(0, 0)
        try:
            for fault, _ in order:
                fault.before(scene)
            command = Command(self, scene, len(order))
            for (fault, number), share in zip(order, shares, strict=True):
                moment = command.strike(fault, share, expected.seconds, len(order))
                if number == order[-1][1]:
                    loss = self._loss(scene, expected, command.end(), command.repeated)
                reruns, unclear, seconds, line = command.account()
                points.append(
                    Point(
                        stage.name, fault.name, number, first, moment, scene.struck, loss.lost, loss.differing,
                        unclear, reruns, seconds, line,
                    )
                )  # fmt: skip
        finally:
            for undo in reversed(scene.undo):
                undo()
            if self.raylets is not None:
                self.raylets.restore()
        if not (loss.lost or loss.differing):
            for old in folder.parent.glob(f"{folder.name}*"):
                shutil.rmtree(old)
        return points

    def start(
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

    def last_line(self) -> str:
        lines = [line for line in self.said.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    @staticmethod
    def _loss(scene: Scene, expected: Undisturbed, status: int | None, repeated: int) -> Loss:
        if status != 0:
            return Loss(scene.stage.total, 0)
        loss = scene.stage.loss(scene.output, expected.output)
        is_logged = scene.tracking is None or scene.tracking.finished_runs() > 0
        return Loss(loss.lost + max(repeated - MADE_AGAIN, 0) + (not is_logged), loss.differing)


class Command:
    """A stage's command under faults: where it ends before its time it is run again, after what the faults left is put
    right. `faults` are those that have had their moment, `repeated` the most steps that a training made again at one
    time."""

    def __init__(self, laboratory: Laboratory, scene: Scene, count: int) -> None:
        self.faults: list[Fault] = []
        self.repeated = 0
        self._laboratory, self._scene = laboratory, scene
        self._reruns_left = RERUNS * count
        self._driver = scene.driver = self._started()
        self._forget()

    def strike(self, fault: Fault, share: float, seconds: float, count: int) -> str:
        """Wait for the moment and let the fault strike; says when that was, and how much was done by then. The moment
        is the share of the stage's progress, or a random one of the next `seconds / count`."""
        scene, stage = self._scene, self._scene.stage
        if not fault.has_moment:
            self.faults.append(fault)
            return "its place"
        scene.struck, scene.was_missed = "", False
        by_progress, patience = scene.draw.random() < 0.5, scene.draw.uniform(0.02, 0.98) * seconds / count
        by_progress |= fault.by_progress
        began = time.monotonic()
        while self._is_running():
            passed, done = time.monotonic() - began, _seen(stage.progress, scene.output)
            self.repeated = max(self.repeated, _seen(stage.repeated, scene.output))
            is_moment = done >= max(share * stage.total, 1) if by_progress else passed >= patience
            if is_moment or passed > SLACK * seconds:
                self.faults.append(fault)
                fault.strike(scene)
                return MISSED if scene.was_missed else f"{passed:.1f} s, {done} of {stage.total}"
            time.sleep(EVERY_S)
        self.faults.append(fault)
        return MISSED

    def end(self) -> int | None:
        """Let it come to its end, run again where that takes it; returns its status, None where it does not end."""
        once_more = any(fault.again for fault in self.faults)
        while True:
            status = self._wait()
            for fault in self.faults:
                fault.after(self._scene)
            is_done = status == 0 and not once_more and UNANSWERED not in self._laboratory.last_line()
            if is_done or status is None or not self._reruns_left:
                return status
            once_more &= status != 0
            self._again()

    def account(self) -> tuple[int, int, float, str]:
        """Since the last time this was asked: how often the command was run again, how many of its lines did not say
        what to do, the seconds, and the last such line or other error."""
        accounted = self._reruns, self._unclear, round(time.monotonic() - self._since, 1), self._line
        self._forget()
        return accounted

    def _forget(self) -> None:
        self._reruns, self._unclear, self._since, self._line = 0, 0, time.monotonic(), ""

    def _is_running(self) -> bool:
        """False where it has come to its end. One that ended before is run again."""
        if self._driver.poll() is None:
            return True
        if self._wait() == 0 or not self._reruns_left:
            return False
        for fault in self.faults:
            fault.after(self._scene)
        self._again()
        return True

    def _wait(self) -> int | None:
        deadline = time.monotonic() + PATIENCE_S
        while (status := self._driver.poll()) is None and time.monotonic() < deadline:
            self.repeated = max(self.repeated, _seen(self._scene.stage.repeated, self._scene.output))
            time.sleep(EVERY_S)
        if status is None:
            self._driver.kill()
            self._driver.wait()
        if status not in (0, -9):
            line = self._laboratory.last_line()
            self._line = f"does not end; {line}" if status is None else line
            self._unclear += not all(_is_clear(line, fault) for fault in self.faults[-1:])
        return status

    def _again(self) -> None:
        self._reruns += 1
        self._reruns_left -= 1
        self._driver = self._scene.driver = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        scene = self._scene
        then = tuple(argument for fault in self.faults for argument in fault.then)
        return self._laboratory.start(scene.stage, scene.inputs, scene.output, scene.environment, then)


def _seen(look: Callable[[Location], int], output: Location) -> int:
    """0 where files come and go under the look."""
    try:
        return look(output)
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
