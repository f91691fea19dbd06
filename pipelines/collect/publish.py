"""The last step of a collection: from labelled rows in the order they were finished to shards.

Here the whole collection is there, so the top steps by KL are those of the whole (section 4.3), exactly, and
not of each trajectory or of an estimate. Rows go into shards in the order of their prompts, each once: the
same recipe gives the same shards however often the collecting was interrupted. This module knows nothing of
Ray or of models.

Axes: _S all steps of the collection.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.layout import COLLECTED, SHARDS
from pipelines.data.schema import SHARD
from pipelines.data.shards import ShardError, questions, shard_name, write_shard
from s2t_models.calibration import BUDGETS, THRESHOLDS, Calibration, calibrate
from s2t_models.errors import NothingDone, one_line
from s2t_models.noise import uniforms
from s2t_models.recipe import Recipe
from s2t_models.storage import whole

HITS = (1, 2, 4, 8)
QUANTILES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
_ROWS_A_SHARD = 512


def publish(
    files: list[Path], uids: list[str], output: Path, metadata: dict[str, str], recipe: Recipe
) -> dict[str, Any]:
    """Write `output`'s shards, thresholds and summary from the rows in `files`; returns the summary.

    The shards appear last and all at once. Raises ShardError where a row is missing, NothingDone where every row
    errored.
    """
    rows = _rows(files, uids)
    everything = pa.concat_tables(rows)
    steps_S = {name: _flat(everything, name) for name in ("kl_T", "entropy_T", "teacher_rank_T")}
    if not len(steps_S["kl_T"]):
        first = next((error for error in everything["error"].to_pylist() if error), "no token was written")
        raise NothingDone(
            f"all {len(uids)} rows errored, and there is nothing to publish (the first: {one_line(first)})"
        )
    least_kl = calibrate(steps_S["kl_T"], [recipe.collect.steps])[recipe.collect.steps]

    starts = range(0, len(rows), _ROWS_A_SHARD)
    kept = 0
    with whole(output / SHARDS) as part:
        part.mkdir()
        for index, start in enumerate(starts):
            table = _keep(pa.concat_tables(rows[start : start + _ROWS_A_SHARD]).combine_chunks(), least_kl, recipe)
            kept += len(table["kept"].combine_chunks().flatten())
            write_shard(part / shard_name(index, len(starts)), table, metadata)
        calibration = Calibration(
            kl=calibrate(steps_S["kl_T"], BUDGETS),
            entropy=calibrate(steps_S["entropy_T"], BUDGETS),
            steps=len(steps_S["kl_T"]),
            rows=tuple(questions(everything)),
            **{name: metadata[f"s2t.{name}"] for name in ("task", "slm", "teacher", "tokenizer", "divergence")},
        )
        summary = _summary(everything, steps_S, calibration.threshold("kl", 0.01)) | {
            "kept_steps": kept,
            "least_kl": float(least_kl),
        }
        write_json(output / THRESHOLDS, calibration.model_dump(mode="json"))
        write_json(output / COLLECTED, summary)
    return summary


def _rows(files: list[Path], uids: list[str]) -> list[pa.Table]:
    """One single-row table a prompt, in the order of the prompts, memory-mapped."""
    found: dict[str, pa.Table] = {}
    for path in files:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        for row, uid in enumerate(table["uid"].to_pylist()):
            found[uid] = table.slice(row, 1)
    missing = [uid for uid in uids if uid not in found]
    if missing:
        raise ShardError(
            f"{len(missing)} of {len(uids)} rows are missing, the first of them {missing[0]}; collect again"
        )
    return [found[uid] for uid in uids]


def _keep(table: pa.Table, least_kl: float, recipe: Recipe) -> pa.Table:
    """Drop the candidates of all steps but the top ones by KL and, of the rest, a random share."""
    column = table["kept"].combine_chunks()
    flat = column.flatten()
    lengths = column.value_lengths().fill_null(0).to_numpy()
    kl_S = _flat(table, "kl_T")
    by_kl_S = kl_S >= least_kl
    share = recipe.collect.random_steps
    noise = [uniforms(seed, 0, int(n), "trigger") for seed, n in zip(table["seed"].to_pylist(), lengths, strict=True)]
    stays_S = by_kl_S | (np.concatenate(noise) < share)
    row_S = np.repeat(np.arange(len(table)), lengths)
    counts = np.bincount(row_S[stays_S], minlength=len(table))
    steps = flat.filter(pa.array(stays_S))
    fields = {field.name: steps.field(field.name) for field in steps.type}
    fields["by_kl"] = pa.array(by_kl_S[stays_S])
    struct = pa.StructArray.from_arrays(list(fields.values()), fields=list(steps.type))
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]), pa.int32())
    kept = pa.ListArray.from_arrays(offsets, struct, type=SHARD.field("kept").type, mask=column.is_null())
    return table.set_column(table.schema.get_field_index("kept"), SHARD.field("kept"), kept)


def _summary(table: pa.Table, steps_S: dict[str, np.ndarray], top_kl: float) -> dict[str, Any]:
    errors = Counter(error.partition(":")[0] for error in table["error"].to_pylist() if error)
    top_rank = steps_S["teacher_rank_T"][steps_S["kl_T"] >= top_kl]
    return {
        "rows": len(table),
        "errors": dict(sorted(errors.items())),
        "first_error": next((error for error in table["error"].to_pylist() if error), None),
        "finish": dict(sorted(Counter(reason for reason in table["finish"].to_pylist() if reason).items())),
        "steps": len(steps_S["kl_T"]),
        "agreement": float((steps_S["teacher_rank_T"] == 0).mean()),
        "hit": {str(k): float((top_rank < k).mean()) for k in HITS},
        "kl_quantiles": _quantiles(steps_S["kl_T"]),
        "entropy_quantiles": _quantiles(steps_S["entropy_T"]),
    }


def _flat(table: pa.Table, name: str) -> np.ndarray:
    """A step column of all rows without an error, laid end to end."""
    labelled = table.filter(table["error"].is_null())
    return np.concatenate([chunk.flatten().to_numpy() for chunk in labelled[name].chunks] or [np.zeros(0)])


def _quantiles(values_S: np.ndarray) -> dict[str, float]:
    return {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(values_S, QUANTILES), strict=True)}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")
