"""Collect and benchmark on more and more nodes: rows a second, and how much of it each further node adds; and the
driver's memory by the number of prompts.

    python -m benchmarks.scaling --nodes 1,2,4
    python -m benchmarks.scaling --prompts 1000,10000 --speed 100

Nodes are raylets of this machine with one CPU and one pretended GPU each, which hold an SLM and a teacher. A head with
CPUs of its own has the driver, and what reads and writes. The engines sleep (`sleeping`), `--speed` times as fast as
real ones were measured: so what is seen is how the stages keep engines busy, not how fast a model is. All nodes share
this machine's cores, which are full at some speed.

Rates are those between a fifth and nine tenths of the rows, when all engines are at work. Each node has as many rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import sleeping
from pipelines.runtime.records import NewLines
from s2t_models.recipe import Recipe, load_recipe

STAGES = ("collect", "benchmark")
BEGIN, END = 0.2, 0.9
#: Slots of an engine, rows of a batch.
AT_ONCE = 16
#: The longest answer in tokens, and where the number of prompts is what matters.
ANSWER, SHORT = 128, 16
#: Items and seeds of the embedded task make the questions.
ITEMS = 1000
MIB = 1024**2


def recipe(nodes: int, rows: int, tokens: int) -> Recipe:
    """The embedded recipe with an SLM and a teacher that sleep on each of `nodes` nodes; about `rows` rows a job."""
    pool = {"actors": nodes, "num_cpus": 0.25, "num_gpus": 0.5, "batch": AT_ONCE}
    engine = {"engine": sleeping.NAME, "slots": AT_ONCE, "num_replicas": nodes, "num_cpus": 0.25, "num_gpus": 0.5}
    items = min(rows, ITEMS)
    settings = {
        "collect.writer": "slm",
        "collect.prompts": rows,
        "collect.max_new_tokens": tokens,
        **{f"collect.{name}.{key}": value for name in ("rollout", "label") for key, value in pool.items()},
        **{f"{name}.{key}": value for name in ("slm", "teacher") for key, value in engine.items()},
        "trigger.threshold": 1.0,
        "serving.gateway_replicas": nodes,
        "benchmark.items": items,
        "benchmark.seeds": list(range(-(-rows // items))),
        "benchmark.policies": ["s2t"],
        "benchmark.max_new_tokens": tokens,
        # Twice the slots: requests are not spread evenly at every moment, and an engine must not wait for the driver.
        "benchmark.concurrency": 2 * AT_ONCE * nodes,
    }
    return load_recipe("embedded", [f"{key}={value}" for key, value in settings.items()])


@contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """A head and `nodes` raylets; yields the address."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else drivers take a token that the machine may have, and raylets none
    from ray.cluster_utils import Cluster

    store = {"object_store_memory": 200 * MIB}
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **store})
    try:
        for _ in range(nodes):
            started.add_node(num_cpus=1, num_gpus=1, **store)
        yield str(started.address)
    finally:
        started.shutdown()


class Watch:
    """Counts what is done until the `with` block ends."""

    def __init__(self, count: Callable[[], int], total: int) -> None:
        self._count, self._total = count, total
        self._seen: list[tuple[float, int]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.1):
            try:
                self._seen.append((time.monotonic(), self._count()))
            except OSError:  # files go at the end
                continue

    @property
    def rate(self) -> float:
        """Rows a second between BEGIN and END of all rows."""
        first, last = (
            next((when, count) for when, count in self._seen if count >= share * self._total) for share in (BEGIN, END)
        )
        return (last[1] - first[1]) / (last[0] - first[0])


def run_here(stage: str, nodes: int, rows: int, tokens: int, speed: float, folder: Path) -> dict[str, float]:
    """Run the stage as the driver of a job; returns its rate, seconds and this process' peak memory in MB."""
    import ray

    from pipelines.benchmark.job import Options, benchmark
    from pipelines.collect.job import collect
    from pipelines.data.layout import ANSWERS
    from pipelines.data.sink import CommittedRows

    asked = recipe(nodes, rows, tokens)
    sleeping.register()
    ray.init(
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=sleeping.runtime_env({"slm": speed, "teacher": speed}, tokens),
    )
    output = folder / "out"
    if stage == "collect":
        count: Callable[[], int] = CommittedRows(output / "work" / "labelled", output / "work" / "checkpoint")
        work: Callable[[], object] = partial(collect, asked, output, _prompts(folder / "prompts.jsonl", rows))
    else:
        count = _counts(NewLines(output / ANSWERS))
        work = partial(benchmark, asked, output, Options())
        rows = asked.benchmark.items * len(asked.benchmark.seeds)
    began = time.monotonic()
    with Watch(count, rows) as watch:
        work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rate": watch.rate, "seconds": time.monotonic() - began, "peak": peak}


def _prompts(file: Path, rows: int) -> Path:
    """So many prompts of about 400 characters: the tasks have fewer."""
    with file.open("w") as lines:
        for number in range(rows):
            prompt = f"Problem {number}. " + "What is 17+25? " * 25
            lines.write(json.dumps({"uid": str(number), "prompt": prompt}) + "\n")
    return file


def _counts(lines: NewLines) -> Callable[[], int]:
    """How many lines there have been so far."""
    so_far = 0

    def count() -> int:
        nonlocal so_far
        so_far += lines.count()
        return so_far

    return count


def run(stage: str, nodes: int, rows: int, tokens: int, speed: float) -> dict[str, float]:
    """Run the stage in a process of its own, on a cluster of its own."""
    with tempfile.TemporaryDirectory() as folder, cluster(nodes) as address:
        point = json.dumps([stage, nodes, rows, tokens, speed, folder])
        environment = {
            "RAY_ADDRESS": address,
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        command = [sys.executable, "-m", "benchmarks.scaling", "--point", point]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
        return found


def main() -> int:
    options = _parse()
    if options.point:
        stage, nodes, rows, tokens, speed, folder = json.loads(options.point)
        print(json.dumps(run_here(stage, nodes, rows, tokens, speed, Path(folder))))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster ends too
    # For the workers too, which import the engine.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    print(
        "| stage | nodes | rows | rows a second | efficiency | seconds | driver's peak, MB |\n" + "|---|" + "---:|" * 6
    )
    prompts = [int(text) for text in options.prompts.split(",")] if options.prompts else []
    for stage in options.stage.split(","):
        alone = 0.0
        sizes = [(nodes, nodes * options.rows) for nodes in map(int, options.nodes.split(","))]
        for nodes, rows in [(2, rows) for rows in prompts] or sizes:
            found = run(stage, nodes, rows, SHORT if prompts else ANSWER, options.speed)
            alone = alone or found["rate"] / nodes
            efficiency = "" if prompts else f"{found['rate'] / nodes / alone:.2f}"
            print(
                f"| {stage} | {nodes} | {rows:,} | {found['rate']:.2f} | {efficiency} | {found['seconds']:.0f} | "
                f"{found['peak']:.0f} |",
                flush=True,
            )
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--stage", default=",".join(STAGES), help="stages, separated by commas")
    parser.add_argument("--nodes", default="1,2,4", help="numbers of nodes, separated by commas")
    parser.add_argument("--rows", type=int, default=192, help="rows a node")
    parser.add_argument("--prompts", help="in place of nodes: numbers of rows with short answers, on two nodes")
    parser.add_argument("--speed", type=float, default=4.0, help="how many times the measured speed engines have")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
