"""A training as an MLflow run: the collections it began with, its best figures, and what was trained as a version of a
registered model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipelines.data.shards import read_metadata
from pipelines.runtime import tracking
from s2t_models.node_cache import fetched
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.storage import Location
from serving.registry import register, registered, weights_of
from serving.store import use_store

#: The tag that holds the digest of the shards trained on.
_TRAINING = "s2t.training"


@contextmanager
def training_run(recipe: Recipe, provenance: Provenance, collections: Mapping[str, Location]) -> Iterator[str]:
    """A run with the recipe as its parameters and the collections (role -> folder) as its inputs. Yields its id."""
    parameters = {"recipe": recipe.model_dump(), "objective": provenance.objective}
    tags = {"s2t.stage": "distil", _TRAINING: provenance.shards["training"]}
    with tracking.start_run(f"distil-{provenance.objective}", parameters, tags) as run:
        for role, folder in collections.items():
            task = read_metadata(folder)["s2t.task"]
            tracking.log_dataset(tracking.dataset(task, provenance.shards[role], folder), role)
        yield run


def log_trained(recipe: Recipe, done: Provenance, output: Location) -> None:
    """Log the best figures to the active run, and register what lies in `output` with them."""
    tracking.log_text(done.model_dump_json(indent=2), "provenance.json")
    version = register(recipe, fetched(output), done)
    best = {f"best/{name}": value for name, value in done.validation.items()}
    tracking.log_metrics(
        best | {f"trigger/{name}": value for name, value in done.trigger_head.items()}, model_id=version.model_id
    )
    print(f"registered   {version.uri}")


def log_if_missing(recipe: Recipe, done: Provenance, output: Location, collections: Mapping[str, Location]) -> None:
    """Register what an earlier job trained where the store does not know it. Raises StoreError."""
    use_store()
    if not registered([weights_of(fetched(output), recipe)]):
        with training_run(recipe, done, collections):
            log_trained(recipe, done, output)


def show_link(run: str, provenance: Provenance) -> None:
    """Print where the run is seen, beside others that were trained on the same shards."""
    others = [other for other in tracking.find_runs(_TRAINING, provenance.shards["training"]) if other != run]
    print(f"in MLflow    {tracking.link([run, *others])}")
