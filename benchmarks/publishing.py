"""Publishing a collection of many rows: seconds, and the driver's memory, which is to stay where it is.

    python -m benchmarks.publishing --rows 10000,100000

Rows are made up: answers of `--steps` tokens with 16 candidates at every step, as labelling leaves them. They are
written to `--folder` first, and removed at the end.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.collect.actors import LABELLED
from s2t_models.recipe import Recipe, load_recipe

ROWS_A_FILE = 32
#: One in so many rows has an error.
ERRORS = 17


def labelled_files(
    folder: Path, rows: int, steps: int, recipe: Recipe, rows_a_file: int = ROWS_A_FILE, seed: int = 0
) -> list[Path]:
    """Write `rows` made-up labelled rows in an order of their own, as a collection's actors do; returns the files."""
    folder.mkdir(parents=True)
    files = []
    for number, start in enumerate(range(0, rows, rows_a_file)):
        rng = np.random.default_rng([seed, number])
        index = rng.permutation(np.arange(start, min(start + rows_a_file, rows)))
        path = folder / f"{number:07d}.arrow"
        table = pa.Table.from_pylist([_row(int(i), steps, recipe.collect.k, rng) for i in index], LABELLED)
        with pa.ipc.new_file(path, LABELLED) as writer:
            writer.write_table(table)
        files.append(path)
    return files


def _row(index: int, steps: int, k: int, rng: np.random.Generator) -> dict[str, Any]:
    row: dict[str, Any] = {
        "index": index,
        "uid": f"row {index}",
        "questions": [f"hash {index}"],
        "prompt": f"prompt {index}",
        "prompt_ids": list(range(20)),
        "seed": index,
        "temperature": 0.0,
    }
    if index % ERRORS == 3:
        return row | {"error": "failed: made up"}
    length = int(rng.integers(steps // 2, steps + 1))
    candidates_TK = rng.integers(0, 50_000, (length, k), np.int32)
    slm_TK, teacher_TK = (np.sort(rng.normal(-4, 2, (length, k)).astype(np.float32))[:, ::-1] for _ in range(2))
    return row | {
        "output_ids": candidates_TK[:, 0],
        "finish": "end",
        "kl_T": rng.lognormal(-4, 2, length).astype(np.float32),
        "entropy_T": rng.lognormal(-2, 1, length).astype(np.float32),
        "teacher_argmax_T": candidates_TK[:, 0],
        "teacher_rank_T": rng.geometric(0.7, length).astype(np.int32) - 1,
        "kept": [
            {
                "step": step,
                "by_kl": False,
                "candidates_K": candidates_TK[step],
                "slm_logprobs_K": slm_TK[step],
                "teacher_logprobs_K": teacher_TK[step],
            }
            for step in range(length)
        ],
    }


def _publish(folder: Path, rows: int) -> None:
    """Publish what lies in `folder`, as the driver of a job, and print what that took."""
    from pipelines.collect.publish import publish
    from pipelines.data.shards import shard_metadata
    from serving import cluster

    recipe = load_recipe("embedded")
    cluster.start()
    files = sorted((folder / "labelled").iterdir())
    before = _peak_mb()
    began = time.perf_counter()
    summary = publish(files, rows, folder, shard_metadata(recipe, "s", "t", "tok", "made up"), recipe)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in files) / 1e9
    print(
        f"| {rows:,} | {summary['steps']:,} | {size:.2f} | {seconds:.1f} | {before:.0f} | {_peak_mb():.0f} |",
        flush=True,
    )


def _make(folder: Path, rows: int, steps: int) -> None:
    """Write the labelled rows on the cluster, some files a task."""
    labelled_files(folder / "labelled", rows, steps, load_recipe("embedded"))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.publishing", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1000,10000,100000", help="how many rows, separated by commas")
    parser.add_argument("--steps", type=int, default=16, help="the longest answer, tokens")
    parser.add_argument("--folder", type=Path, help="where the rows are written for the time being")
    parser.add_argument("--publish", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        _publish(options.folder, options.publish)
        return 0
    print(
        "| rows | steps | GB | seconds | driver before, MB | driver's peak, MB |\n|---:|---:|---:|---:|---:|---:|",
        flush=True,
    )
    for rows in (int(text) for text in options.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            _make(Path(folder), rows, options.steps)
            command = [sys.executable, "-m", "benchmarks.publishing", "--folder", folder, "--publish", str(rows)]
            subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
