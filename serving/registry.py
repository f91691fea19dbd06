"""Trained models as versions in MLflow's registry: what `s2t distil` registers and `s2t serve models:/NAME/VERSION`
serves.

A version is a folder that stands by itself:

    recipe.yaml    the pair and the settings it was trained with, to serve it with
    trained/       what was trained: an artifact, a plain checkpoint, a router, or a second pass

In a store on this file system the files are hard links: the weights take no room twice, and the version stays when the
folder they came from is replaced. Elsewhere they are uploaded. A model is known by the sha256 of its weights, so that a
benchmark finds the version it was answered by, wherever that was served.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from s2t_models import loading
from s2t_models.artifact import CARD, Artifact, read_provenance
from s2t_models.errors import UserError, one_line
from s2t_models.provenance import Provenance
from s2t_models.recipe import Recipe, load_recipe
from s2t_models.router import SETTINGS, weights_hash
from s2t_models.second_pass import CARD as SECOND_PASS
from s2t_models.second_pass import SecondPass
from s2t_models.storage import whole
from serving.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

RECIPE, TRAINED = "recipe.yaml", "trained"
#: The tag that holds the sha256 of a model's weights.
WEIGHTS_TAG = "s2t.weights"
#: Where versions that lie elsewhere are downloaded to, each once.
DOWNLOADS = Path("runs/models")
_URI = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


class RegistryError(UserError):
    """A version that is not there or cannot be used; the message is one line."""


@dataclass(frozen=True)
class Version:
    """A registered version: its URI, as `recipe_of` takes it, and the id of the logged model behind it."""

    uri: str
    model_id: str


def register(recipe: Recipe, folder: Path, provenance: Provenance) -> Version:
    """Keep the trained model in `folder` with the active run, as the next version of RECIPE-OBJECTIVE (what a name may
    not hold becomes a dash) in the store of the last `use_store`. One that is registered already is left as it is."""
    import mlflow

    weights = weights_of(folder, recipe)
    if known := registered([weights]):
        return known[weights]
    tags = {
        WEIGHTS_TAG: weights,
        "s2t.objective": provenance.objective,
        "s2t.recipe": provenance.recipe,
        "s2t.base_weights": provenance.base_weights,
        "s2t.teacher_weights": provenance.teacher_weights,
        "s2t.budget": f"{recipe.budget:g}",
        **{f"s2t.{role}": digest for role, digest in provenance.shards.items()},
    }
    name = re.sub(r"[^\w-]+", "-", f"{recipe.name}-{provenance.objective}")  # MLflow takes no dots, as in Qwen2.5
    parameters = {key: str(value)[:500] for key, value in provenance.settings.items()}
    model = mlflow.initialize_logged_model(name, tags=tags, params=parameters, model_type=provenance.objective)
    try:
        _keep(model, recipe, folder)
    except BaseException:
        mlflow.finalize_logged_model(model.model_id, "FAILED")
        raise
    model = mlflow.finalize_logged_model(model.model_id, "READY")
    with contextlib.redirect_stderr(io.StringIO()):  # where it says what it does
        version = mlflow.register_model(model.model_uri, name, tags=tags)
    return Version(f"models:/{name}/{version.version}", model.model_id)


def registered(weights: Iterable[str]) -> dict[str, Version]:
    """The latest version of each of these weights that the store has, by the sha256 of the weights."""
    import mlflow

    found = {}
    for digest in weights:
        versions = mlflow.search_model_versions(
            filter_string=f"tags.`{WEIGHTS_TAG}` = '{digest}'", order_by=["creation_timestamp DESC"], max_results=1
        )
        for version in versions:
            uri = f"models:/{version.name}/{version.version}"
            found[digest] = Version(uri, str(version.source).removeprefix("models:/"))
    return found


def weights_of(folder: Path, recipe: Recipe) -> str:
    """sha256 of the trained weights in `folder`, as engines report those that they serve."""
    if (folder / CARD).is_file():
        return loading.weights_hash(Artifact.load(folder).model(recipe.slm))
    if (folder / SETTINGS).is_file():
        return weights_hash(folder)
    if (folder / SECOND_PASS).is_file():
        return SecondPass.load(folder).weights_hash
    return loading.weights_hash(recipe.slm.model_copy(update={"path": str(folder), "revision": None}))


def recipe_of(uris: Sequence[str], recipe: str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that serves the versions `uris` (models:/NAME/VERSION or models:/NAME@ALIAS) side by side: that of the
    first one, or `recipe`, with their models in it. The first of a kind (artifact, router, checkpoint of an objective)
    is the recipe's own; a further one is called NAME-VERSION or NAME-ALIAS, where what such a name may not hold becomes
    a dash.

    Raises RegistryError where there is no such version, it holds no model of this project, its name is taken, or it is
    a further second pass, of which the SLM has one, StoreError where there is no store, and RecipeError."""
    if twice := next((uri for uri in uris if uris.count(uri) > 1), None):
        raise RegistryError(f"{twice}: is named twice")
    folders = [_fetched(uri) for uri in uris]
    chosen = load_recipe(recipe or folders[0] / RECIPE, overrides)
    kinds: set[str] = set()
    for uri, folder in zip(uris, folders, strict=True):
        kind, trained = _kind(folder / TRAINED), str(folder / TRAINED)
        chosen = _with_further(chosen, kind, trained, uri) if kind in kinds else _with_own(chosen, kind, trained)
        kinds.add(kind)
    return chosen


def _fetched(uri: str) -> Path:
    """The folder of a version, which holds a model that was registered here."""
    folder = _fetch(uri)
    if not (folder / RECIPE).is_file() or not read_provenance(folder / TRAINED):
        raise RegistryError(f"{uri}: is no model that `s2t distil` registered ({folder} has no {RECIPE} or {TRAINED})")
    return folder


def _kind(trained: Path) -> str:
    """What it is: "artifact", "router", "tah", or the objective of a checkpoint."""
    if (trained / CARD).is_file():
        return "artifact"
    provenance = read_provenance(trained)
    assert provenance is not None
    return "router" if (trained / SETTINGS).is_file() else provenance.objective


def _with_own(recipe: Recipe, kind: str, path: str) -> Recipe:
    if kind == "artifact":
        return recipe.model_copy(update={"artifact": path})
    if kind == "router":
        return recipe.model_copy(update={"router": recipe.router.model_copy(update={"path": path})})
    if kind == "tah":
        return recipe.model_copy(update={"tah": path})
    return recipe.model_copy(update={"checkpoints": {**recipe.checkpoints, kind: path}})


def _with_further(recipe: Recipe, kind: str, path: str, uri: str) -> Recipe:
    if kind == "tah":
        raise RegistryError(f"{uri}: the SLM has one second pass, and the recipe has it already; serve this one alone")
    section = {"artifact": "artifacts", "router": "routers"}.get(kind, "checkpoints")
    named, name = getattr(recipe, section), re.sub(r"[^A-Za-z0-9_-]+", "-", uri.removeprefix("models:/")).lstrip("_-")
    if name in named:
        raise RegistryError(f"{uri}: the recipe has {section}.{name} already; rename or drop that one")
    return recipe.model_copy(update={section: {**named, name: path}})


def _keep(model: LoggedModel, recipe: Recipe, folder: Path) -> None:
    import mlflow

    # What else the recipe names lies on this machine, and may be gone when the version is served.
    alone = recipe.model_copy(
        update={
            "artifact": None,
            "tah": None,
            "artifacts": {},
            "routers": {},
            "checkpoints": {},
            "router": recipe.router.model_copy(update={"path": None}),
            "trigger": recipe.trigger.model_copy(update={"calibration": None}),
        }
    )
    text = alone.as_yaml()
    if kept := _local(model.artifact_location):
        shutil.copytree(folder, kept / TRAINED, copy_function=_link)
        (kept / RECIPE).write_text(text)
        return
    client = mlflow.MlflowClient()
    client.log_model_artifacts(model.model_id, str(folder), TRAINED)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / RECIPE
        path.write_text(text)
        client.log_model_artifact(model.model_id, str(path))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _local(uri: str) -> Path | None:
    """The folder of a file: URI or a path; None for what is elsewhere."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _fetch(uri: str) -> Path:
    """The folder of a version, downloaded where it lies elsewhere."""
    if not (parts := _URI.fullmatch(uri)):
        raise RegistryError(f"{uri}: names no version; write models:/NAME/VERSION or models:/NAME@ALIAS")
    store = open_store()
    import mlflow

    client = mlflow.MlflowClient()
    name, number, alias = parts["name"], parts["version"], parts["alias"]
    try:
        version = client.get_model_version(name, number) if number else client.get_model_version_by_alias(name, alias)
        source = str(version.source)
        model = mlflow.get_logged_model(source.removeprefix("models:/")) if source.startswith("models:/m-") else None
    except mlflow.exceptions.MlflowException as error:
        names = ", ".join(sorted(model.name for model in client.search_registered_models())) or "none"
        raise RegistryError(f"{uri}: {one_line(error)}; registered in {store}: {names}") from None
    if model is None:
        raise RegistryError(f"{uri}: is no model that `s2t distil` registered (its source is {source})")
    if folder := _local(model.artifact_location):
        if not folder.is_dir():
            raise RegistryError(f"{uri}: its files are not at {folder}; use the store on the machine that has them")
        return folder
    folder = (DOWNLOADS / model.model_id).resolve()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"serve: downloading {uri} to {folder}", flush=True)
        try:
            with whole(folder) as part:
                part.mkdir()
                mlflow.artifacts.download_artifacts(model.model_uri, dst_path=str(part))
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise RegistryError(f"{uri}: cannot be downloaded: {one_line(error)}") from None
    return folder
