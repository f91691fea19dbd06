"""A part of a collection that is slow holds back what stands before it: neither the object store nor a process fills
up. On Ray Data as it is, with engines that sleep."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

#: What the run says: rows in all, the most that were on their way, the most that the object store held as a share of
#: it, bytes spilled, and the most that a worker took, bytes.
SCRIPT = """
import json, sys, threading, time
from pathlib import Path

import psutil
import ray
from ray._private import internal_api

from benchmarks import sleeping
from pipelines.collect import job
from pipelines.collect.actors import Rollouts
from pipelines.data.sink import ArrowSink, CommittedRows
from s2t_models.recipe import load_recipe

ROWS, STORE = 1600, 80 * 2**20
folder, slow = Path(sys.argv[1]), sys.argv[2]
sleeping.register()
speeds = {"slm": 1e6, "teacher": 100.0 if slow == "teacher" else 1e6}
ray.init(
    address="local",
    num_cpus=6,
    object_store_memory=STORE,
    log_to_driver=False,
    logging_level="ERROR",
    runtime_env=sleeping.runtime_env(speeds, 512),
)
rolled = ray.remote(num_cpus=0)(type("Rolled", (), {
    "__init__": lambda self: setattr(self, "rows", 0),
    "add": lambda self, rows: setattr(self, "rows", self.rows + rows),
    "get": lambda self: self.rows,
})).remote()


class Counted(Rollouts):
    def __call__(self, prompts):
        rolled.add.remote(prompts.num_rows)
        return super().__call__(prompts)


class SlowDisk(ArrowSink):
    def write_block_to_file(self, block, file):
        time.sleep(1.0)
        super().write_block_to_file(block, file)


job.Rollouts = Counted
if slow == "disk":
    job.ArrowSink = SlowDisk
settings = {
    "slm.engine": "sleeping", "teacher.engine": "sleeping",
    "collect.writer": "slm", "collect.prompts": ROWS, "collect.max_new_tokens": 512,
    **{f"collect.{pool}.batch": 8 for pool in ("rollout", "label")},
    **{f"collect.{pool}.num_cpus": 0.5 for pool in ("rollout", "label")},
}
recipe = load_recipe("embedded", [f"{key}={value}" for key, value in settings.items()])
count = CommittedRows(folder / "work" / "labelled", folder / "work" / "checkpoint")
state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
most = {"ahead": 0, "stored": 0.0, "memory": 0}
done = threading.Event()


def look():
    raylets = [process for process in psutil.Process().children(recursive=True) if process.name() == "raylet"]
    while not done.wait(0.2):
        try:
            committed = count()
            most["ahead"] = max(most["ahead"], ray.get(rolled.get.remote()) - committed)
            stats = internal_api.get_memory_info_reply(state).store_stats
            most["stored"] = max(most["stored"], stats.object_store_bytes_used / STORE)
            most["spilled"] = stats.spilled_bytes_total
            workers = [child for raylet in raylets for child in raylet.children()]
            most["memory"] = max([most["memory"], *(worker.memory_info().rss for worker in workers)])
        except (OSError, psutil.Error):  # files and workers come and go
            continue


watch = threading.Thread(target=look, daemon=True)
watch.start()
summary = job.collect(recipe, folder)
done.set()
print(json.dumps(most | {"rows": summary["rows"], "tokens": summary["steps"]}))
"""
#: Bytes of a rolled-out step in the object store, and of a labelled one.
ROLLED, LABELLED = 520, 230
MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("slow", "bytes_a_token"), [("teacher", ROLLED), ("disk", LABELLED)])
def test_what_is_slow_holds_back_what_stands_before_it(slow: str, bytes_a_token: int, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), str(tmp_path / "out"), slow]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["rows"] == 1600
    assert found["tokens"] * bytes_a_token > 80 * MIB, "held back or not, it would not all fit into the store"
    assert found["spilled"] == 0
    assert found["stored"] < 0.8
    assert found["ahead"] < found["rows"] / 2
