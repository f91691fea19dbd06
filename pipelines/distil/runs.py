"""A training as an MLflow run: the collections it began with, its best figures, and what was trained as a version of a
registered model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipelines.data.shards import read_metadata
from pipelines.distil.follower import Follower
from pipelines.runtime import tracking
from s2t_models.node_cache import fetched
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe
from s2t_models.storage import Location, remove
from serving.registry import register, registered, weights_of
from serving.store import use_store

#: The tag that holds the digest of the shards trained on.
_TRAINING = "s2t.training"


def begin_run(recipe: Recipe, provenance: Provenance, collections: Mapping[str, Location]) -> str:
    """A run with the recipe as its parameters and the collections (role -> folder) as its inputs, left open; its id."""
    parameters = {"recipe": recipe.model_dump(), "objective": provenance.objective}
    tags = {"s2t.stage": "distil", _TRAINING: provenance.shards["training"]}
    with tracking.start_run(f"distil-{provenance.objective}", parameters, tags) as run:
        for role, folder in collections.items():
            task = read_metadata(folder)["s2t.task"]
            tracking.log_dataset(tracking.dataset(task, provenance.shards[role], folder), role)
    tracking.leave_open(run)
    return run


@contextmanager
def open_run(
    recipe: Recipe, provenance: Provenance, collections: Mapping[str, Location], has_begun: bool
) -> Iterator[str | None]:
    """A run that is open while the block trains; None where a training goes on without a store. Raises StoreError where
    one begins without it."""
    run = None
    kept = "the training goes on, and is logged at its end if the store is there then"
    if tracking.use_store_for(has_begun, kept):
        with tracking.costs_nothing(kept):
            run = begin_run(recipe, provenance, collections)
    try:
        yield run
    except BaseException:
        if run is not None:
            tracking.give_up(run)
        raise


def log_trained(
    recipe: Recipe,
    done: Provenance,
    output: Location,
    collections: Mapping[str, Location],
    training: Location,
    curves: Follower,
    run: str | None,
) -> None:
    """Log what was trained to the open run and register it; without one, in a new run, unless the store knows it. Where
    the store fails, the folder `training` stays for the same command to log it from."""
    with tracking.costs_nothing(f"{output} is whole, and the same command logs and registers it"):
        use_store()
        if run is not None or not registered([weights_of(fetched(output), recipe)]):
            run = run or begin_run(recipe, done, collections)
            curves.log(run)
            with tracking.go_on_with(run):
                tracking.log_text(done.model_dump_json(indent=2), "provenance.json")
                version = register(recipe, fetched(output), done)
                best = {f"best/{name}": value for name, value in done.validation.items()}
                trigger = {f"trigger/{name}": value for name, value in done.trigger_head.items()}
                decider = {f"decider/{name}": value for name, value in done.decider.items()}
                asked = done.teacher.model_dump() if done.teacher else {}
                teacher = {f"teacher/{name}": value for name, value in asked.items()}
                tracking.log_metrics(best | trigger | decider | teacher, model_id=version.model_id)
            print(f"registered   {version.uri}")
            _show_link(run, done)
        remove(training)


def _show_link(run: str, provenance: Provenance) -> None:
    """Print where the run is seen, beside others that were trained on the same shards."""
    others = [other for other in tracking.find_runs(_TRAINING, provenance.shards["training"]) if other != run]
    print(f"in MLflow    {tracking.link([run, *others])}")
