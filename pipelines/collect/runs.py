"""A collection as an MLflow run, logged once it is whole: settings, what it found and what it cost, and its rows as a
data set that trainings name as their input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.layout import COLLECTED
from pipelines.data.shards import read_shards, shards_digest
from pipelines.runtime import tracking
from s2t_models.calibration import THRESHOLDS
from s2t_models.recipe import Recipe
from serving.store import use_store

#: The tag that holds the digest of a collection's shards.
COLLECTION = "s2t.collection"


def log_collection(recipe: Recipe, output: Path, metadata: Mapping[str, str], summary: Mapping[str, Any]) -> None:
    """Log the finished collection in `output`, unless it was logged. Raises StoreError."""
    use_store()
    digest = shards_digest(output)
    if tracking.find_runs(COLLECTION, digest):
        return
    task = metadata["s2t.task"]
    settings = {
        "recipe": recipe.name,
        "recipe_digest": recipe.digest(),
        "task": task,
        "divergence": metadata["s2t.divergence"],
        "slm": recipe.slm.path,
        "teacher": recipe.teacher.path,
        "collect": recipe.collect.model_dump(exclude={"task"}),
        "folder": str(output.resolve()),
    }
    with tracking.start_run(f"collect {task}", settings, {"s2t.stage": "collect", COLLECTION: digest}):
        tracking.log_dataset(tracking.dataset(task, digest, output), "collected")
        tracking.log_metrics(_figures(summary) | _teacher_cost(read_shards(output)[0]))
        for name in (THRESHOLDS, COLLECTED):
            tracking.log_file(output / name)


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        "rows": summary["rows"],
        "errors": sum(summary["errors"].values()),
        "steps": summary["steps"],
        "kept_steps": summary["kept_steps"],
        "agreement": summary["agreement"],
        "least_kl": summary["least_kl"],
        **{f"hit_{k}": share for k, share in summary["hit"].items()},
        **{f"kl_quantile_{q}": value for q, value in summary["kl_quantiles"].items()},
    }


def _teacher_cost(table: pa.Table) -> dict[str, float]:
    """Tokens that the teacher read, prompt and answer once each, and wrote: labelling is one forward a row, and writes
    none."""
    whole = table.filter(table["error"].is_null())
    read = sum(pc.sum(pc.list_value_length(whole[name])).as_py() or 0 for name in ("prompt_ids", "output_ids"))
    return {"teacher_prefill": read, "teacher_decode": 0}
