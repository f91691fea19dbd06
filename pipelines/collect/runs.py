"""A collection as an MLflow run, logged once it is whole: settings, what it found and what it cost, and its rows as a
data set that trainings name as their input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.data.layout import COLLECTED
from pipelines.data.shards import shards_digest
from pipelines.runtime import tracking
from s2t_models.calibration import THRESHOLDS
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from serving.store import use_store

#: The tag that holds the digest of a collection's shards.
COLLECTION = "s2t.collection"


def log_collection(recipe: Recipe, output: Location, metadata: Mapping[str, str], summary: Mapping[str, Any]) -> None:
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
        tracking.log_metrics(_figures(summary))
        for name in (THRESHOLDS, COLLECTED):
            tracking.log_text((output / name).read_text(), name)


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        "rows": summary["rows"],
        "errors": sum(summary["errors"].values()),
        "steps": summary["steps"],
        "kept_steps": summary["kept_steps"],
        "agreement": summary["agreement"],
        "least_kl": summary["least_kl"],
        "teacher_prefill": summary["teacher_prefill"],
        "teacher_decode": summary["teacher_decode"],
        **{f"hit_{k}": share for k, share in summary["hit"].items()},
        **{f"kl_quantile_{q}": value for q, value in summary["kl_quantiles"].items()},
    }
