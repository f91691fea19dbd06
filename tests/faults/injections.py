"""The faults: what is prepared before a run, what strikes at its moment, and what is put right before the same command
is run again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import pyarrow as pa

from pipelines.data.layout import SHARDS
from pipelines.data.seal import sealed
from s2t_models.storage import Location

from .object_store import ObjectStore
from .raylets import Raylets
from .stages import Stage
from .tracking_server import TrackingServer

#: How long a node that was killed is away, and an object store that cannot be reached.
AWAY_S, STORE_AWAY_S = 3.0, 60.0


@dataclass
class Scene:
    """One point's run: the stage, its cluster and folders, the driver while it runs, and what the fault keeps. `peak`
    is the most that an undisturbed run had on its disk, bytes; `environment` goes to the driver."""

    stage: Stage
    raylets: Raylets | None
    inputs: Path
    folder: Path
    draw: random.Random
    peak: int
    driver: subprocess.Popen[bytes] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    objects: ObjectStore | None = None
    tracking: TrackingServer | None = None
    put_back: Callable[[], object] = lambda: None
    struck: str = ""
    was_missed: bool = False

    @property
    def cluster(self) -> Raylets:
        assert self.raylets is not None
        return self.raylets

    @property
    def output(self) -> Location:
        return self.folder / "out" if self.objects is None else self.objects.folder(self.folder.name)

    def beside(self, name: str) -> Path:
        """A folder of the fault's own, on another file system than the output may be."""
        return self.folder.with_name(f"{self.folder.name}-{name}")


def _nothing(scene: Scene) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """`has_moment` says whether it strikes at a random moment of the run, `by_progress` that something must be done by
    then, `alone` that no other fault can strike the same run; `after`, which may be called more than once, puts right
    what it left; `again` says that the command is run again though it ended well, `then` with what further arguments;
    `says` is what the command's line must hold where it ends with an error."""

    name: str
    before: Callable[[Scene], None] = _nothing
    strike: Callable[[Scene], None] = _nothing
    after: Callable[[Scene], None] = _nothing
    has_moment: bool = True
    by_progress: bool = False
    alone: bool = False
    again: bool = False
    then: tuple[str, ...] = ()
    says: str = ""


def _kill_one(scene: Scene, *names: str) -> None:
    """SIGKILL one of the workers with such a name, as soon as there is one."""
    assert scene.driver is not None
    while scene.driver.poll() is None:
        if found := scene.cluster.workers(*names):
            victim = scene.draw.choice(found)
            with suppress(psutil.Error):
                name = victim.cmdline()[0].removeprefix("ray::").partition(".")[0]
                victim.kill()
                scene.struck = name
                return
        time.sleep(0.05)
    scene.was_missed = True


def _kill_a_raylet(scene: Scene) -> None:
    scene.cluster.kill_raylet(scene.draw)
    time.sleep(AWAY_S)
    scene.cluster.join()


def _kill_the_driver(scene: Scene) -> None:
    assert scene.driver is not None
    scene.driver.kill()


_FILL = """
import sys, time
import numpy as np
import ray

ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=0.01, scheduling_strategy="SPREAD")
class Filler:
    def fill(self, mib):
        self.kept = [ray.put(np.ones(4 * 2**20, np.uint8)) for _ in range(mib // 4)]
        return ray.get_runtime_context().get_node_id()

fillers = [Filler.remote() for _ in range(int(sys.argv[1]))]
ray.get([filler.fill.remote(int(sys.argv[2])) for filler in fillers])
print("full", flush=True)
time.sleep(3600)
"""


def _fill_the_object_stores(scene: Scene) -> None:
    """Objects half as much again as each node's store holds, so that some are spilled before the stage begins."""
    command = [sys.executable, "-c", _FILL, "4", str(scene.cluster.store_mib * 3 // 2)]
    filler = subprocess.Popen(
        command, env=os.environ | {"RAY_ADDRESS": scene.cluster.address}, stdout=subprocess.PIPE, text=True
    )
    scene.undo.append(filler.kill)
    assert filler.stdout is not None
    assert filler.stdout.readline().strip() == "full"


def _small_disk(scene: Scene) -> None:
    """The output's folder on a file system that holds a random share of what the run writes."""
    kib = max(int(scene.peak / 1024 * scene.draw.uniform(0.02, 0.98)), 8)
    scene.struck = f"{kib} KiB"
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", scene.folder], check=True)
    scene.undo.append(lambda: subprocess.run(["umount", "-l", scene.folder], check=True) and None)


def _make_room(scene: Scene) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", scene.folder], check=True)


def _track(scene: Scene) -> None:
    scene.tracking = TrackingServer(scene.beside("mlflow"))
    scene.tracking.start()
    scene.undo.append(scene.tracking.kill)
    scene.environment["MLFLOW_TRACKING_URI"] = scene.tracking.uri
    scene.environment["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"  # seconds of patience, not minutes


def _kill_tracking(scene: Scene) -> None:
    assert scene.tracking is not None
    scene.tracking.kill()


def _track_again(scene: Scene) -> None:
    assert scene.tracking is not None
    scene.tracking.start()


def _lose_the_object_store(scene: Scene) -> None:
    assert scene.objects is not None
    scene.objects.leave(STORE_AWAY_S)


def _find_the_object_store(scene: Scene) -> None:
    assert scene.objects is not None
    scene.objects.wait()


def _damage(path: Path, draw: random.Random, tear: bool) -> str:
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    if tear:
        del content[at:]
    else:
        content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return f"{path.name} at byte {at}"


def _kill_and_damage(scene: Scene, tear: bool) -> None:
    """The driver is killed, and then one file of what it had done is damaged."""
    _kill_the_driver(scene)
    if files := sorted((scene.folder / "out" / "work" / "labelled").glob("*.arrow")):
        scene.struck = _damage(scene.draw.choice(files), scene.draw, tear)


def _damage_a_shard(scene: Scene, damage: Callable[[Path, random.Random], str]) -> None:
    """One shard of a copy of the inputs cannot be used; it is put back afterwards."""
    copy = scene.beside("inputs")
    shutil.copytree(scene.inputs, copy)
    shard = scene.draw.choice(sorted((copy / "train" / SHARDS).glob("*.arrow")))
    whole = shard.read_bytes()
    scene.inputs, scene.put_back = copy, lambda: shard.write_bytes(whole)
    scene.struck = damage(shard, scene.draw)


def _put_back(scene: Scene) -> None:
    scene.put_back()


def _of_version_0(path: Path, draw: random.Random) -> str:
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    path.write_bytes(sealed(table, metadata | {"s2t.version": "0"}))
    return path.name


def _flip(path: Path, draw: random.Random) -> str:
    return _damage(path, draw, tear=False)


def _tear(path: Path, draw: random.Random) -> str:
    return _damage(path, draw, tear=True)


#: The one fault whose output is in an object store.
OBJECT_STORE = "object store away for a minute"
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("actor killed", strike=lambda scene: _kill_one(scene, *scene.stage.actors)),
        Fault("worker killed", strike=_kill_one),
        Fault("gateway killed", strike=lambda scene: _kill_one(scene, ":gateway")),
        Fault("raylet killed", strike=_kill_a_raylet),
        Fault("driver killed", strike=_kill_the_driver),
        Fault(
            "driver killed, other workers",
            strike=_kill_the_driver,
            then=("--set", "distil.workers=1", "--set", "distil.min_workers=1"),
        ),
        Fault("node left", strike=lambda scene: scene.cluster.leave(scene.draw)),
        Fault("node joined", strike=lambda scene: scene.cluster.join()),
        Fault("object store full", before=_fill_the_object_stores, has_moment=False),
        Fault("disk full", before=_small_disk, after=_make_room, has_moment=False, alone=True, says="the disk is full"),
        Fault(OBJECT_STORE, strike=_lose_the_object_store, after=_find_the_object_store, alone=True),
        Fault("MLflow down", before=_track, strike=_kill_tracking, after=_track_again, again=True),
        Fault("file of a killed run torn", strike=partial(_kill_and_damage, tear=True), by_progress=True),
        Fault("file of a killed run changed", strike=partial(_kill_and_damage, tear=False), by_progress=True),
        *(
            Fault(
                f"shard {name}",
                before=partial(_damage_a_shard, damage=damage),
                after=_put_back,
                has_moment=False,
                alone=True,
                says=".arrow: ",
            )
            for name, damage in (("torn", _tear), ("changed", _flip), ("of version 0", _of_version_0))
        ),
    )
}
_ANYWHERE = ("driver killed", "disk full", "MLflow down")
_ON_RAY = ("actor killed", "worker killed", "raylet killed", "node left", "node joined", "object store full")
_INPUTS = ("shard torn", "shard changed", "shard of version 0")
#: The faults that a stage can have.
OF_STAGE = {
    "collect": (*_ON_RAY, OBJECT_STORE, *_ANYWHERE, "file of a killed run torn", "file of a killed run changed"),
    "collect s2t": (*_ON_RAY, *_ANYWHERE),
    "distil": (*_ON_RAY, *_ANYWHERE, *_INPUTS, "driver killed, other workers", OBJECT_STORE),
    "distil kd": (*_ON_RAY, *_ANYWHERE),
    "distil elastic": ("worker killed", "raylet killed", "driver killed", "node left", "node joined"),
    "distil router": (*_ON_RAY, *_ANYWHERE),
    "benchmark": (*_ON_RAY, *_ANYWHERE, "gateway killed", OBJECT_STORE),
    "analyse": (*_ANYWHERE, *_INPUTS, OBJECT_STORE),
}
