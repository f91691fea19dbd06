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

from pipelines.collect.schemas import LABELLED
from pipelines.data.seal import sealed
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
        path.write_bytes(sealed(_rows(index, steps, recipe.collect.k, rng)))
        files.append(path)
    return files


def _rows(index: np.ndarray, steps: int, k: int, rng: np.random.Generator) -> pa.Table:
    failed = index % ERRORS == 3
    lengths = np.where(failed, 0, rng.integers(steps // 2, steps + 1, len(index)))
    total = int(lengths.sum())
    offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())

    def lists(values: pa.Array) -> pa.Array:
        """Of the rows that did not fail."""
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(failed))

    def candidates(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, total * k + 1, k), pa.int32()), pa.array(values))

    tokens = rng.integers(0, 50_000, total * k, np.int32)
    logprobs = [-np.sort(rng.gamma(2, 2, (total, k)).astype(np.float32), axis=1).ravel() for _ in range(2)]
    kept = {
        "step": pa.array(np.arange(total) - np.repeat(lengths.cumsum() - lengths, lengths), pa.int32()),
        "by_kl": pa.array(np.zeros(total, bool)),
        "candidates_K": candidates(tokens),
        "slm_logprobs_K": candidates(logprobs[0]),
        "teacher_logprobs_K": candidates(logprobs[1]),
    }
    columns: dict[str, Any] = {
        "index": index,
        "uid": [f"row {i}" for i in index],
        "questions": [[f"hash {i}"] for i in index],
        "prompt": [f"prompt {i}" for i in index],
        "prompt_ids": [list(range(20))] * len(index),
        "output_ids": lists(pa.array(tokens[::k])),
        "seed": index,
        "temperature": np.zeros(len(index)),
        "finish": [None if bad else "end" for bad in failed],
        "teacher_read": pa.array(20 + lengths, pa.int64(), mask=failed),
        "kl_T": lists(pa.array(rng.lognormal(-4, 2, total).astype(np.float32))),
        "entropy_T": lists(pa.array(rng.lognormal(-2, 1, total).astype(np.float32))),
        "teacher_argmax_T": lists(pa.array(tokens[::k])),
        "teacher_rank_T": lists(pa.array(rng.geometric(0.7, total).astype(np.int32) - 1)),
        "kept": lists(pa.StructArray.from_arrays(list(kept.values()), list(kept))),
        "error": ["failed: made up" if bad else None for bad in failed],
    }
    return pa.table(columns).select(LABELLED.names).cast(LABELLED)


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
    recipe = load_recipe("embedded")
    for rows in (int(text) for text in options.rows.split(",")):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            labelled_files(Path(folder) / "labelled", rows, options.steps, recipe)
            command = [sys.executable, "-m", "benchmarks.publishing", "--folder", folder, "--publish", str(rows)]
            subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
