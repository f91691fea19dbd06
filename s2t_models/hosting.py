"""What a recipe hosts: its engines, the thresholds of its policies, and that all of it belongs together.

It reads folders and hashes; it knows nothing of Ray or HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2t_models import loading
from s2t_models.artifact import Artifact, ArtifactError, read_provenance
from s2t_models.engines.contract import Engine
from s2t_models.policies import Thresholds
from s2t_models.recipe import Model, Recipe, RecipeError
from s2t_models.reserved import reserved_rows
from s2t_models.router import SETTINGS


@dataclass(frozen=True)
class Hosted:
    """One engine: a model with the reserved ids it must not generate, or the S2T-Local artifact in a folder (which
    knows its own), on the device and slots of `settings`. Local paths are absolute: replicas run in other folders."""

    name: str
    settings: Model
    reserved_ids: tuple[int, ...] = ()
    artifact: Path | None = None

    def load(self) -> Engine:
        """The torch engine, with its weights."""
        from s2t_models.engines.torch.engine import TorchEngine

        if self.artifact:
            return TorchEngine.load_artifact(Artifact.load(self.artifact), self.settings, self.name)
        return TorchEngine.load(self.settings, self.name, self.reserved_ids)


def hosted(recipe: Recipe) -> dict[str, Hosted]:
    """The recipe's engines by name: slm, teacher, s2t-local where there is an artifact, and each further checkpoint.

    Raises RecipeError where a folder is missing, or tokenizers or weights do not belong together.
    """
    slm, reserved = _absolute(recipe.slm), reserved_rows(recipe)
    engines = [Hosted("slm", slm, reserved), Hosted("teacher", _absolute(recipe.teacher), reserved)]
    for name, path in recipe.checkpoints.items():
        checkpoint = recipe.slm.model_copy(update={"path": path, "revision": None})
        engines.append(Hosted(name, _absolute(checkpoint), reserved))
    for engine in engines:
        if difference := loading.tokenizer_difference(engine.settings, recipe.slm):
            raise RecipeError(
                f"{engine.name}: the tokenizer of {engine.settings.path} is not that of {recipe.slm.path}: {difference}; "
                "models that work together share one"
            )
    if recipe.artifact:
        artifact = _artifact(recipe)
        engines.append(Hosted("s2t-local", slm, artifact=artifact.folder.resolve()))
    return {engine.name: engine for engine in engines}


def thresholds(recipe: Recipe) -> Thresholds:
    """Those of the artifact, and for KL and entropy those of `trigger.calibration` where it is set.

    An artifact's KL thresholds hold for the teacher and the divergence they were calibrated with, and are left out beside
    another. Raises RecipeError where either is missing or was made for another SLM.
    """
    found: dict[str, dict[str, float]] = {}
    if recipe.artifact:
        card = _artifact(recipe).card
        calibrated = (card.provenance.get("teacher_weights"), card.provenance.get("divergence"))
        same_kl = calibrated == (loading.weights_hash(recipe.teacher), str(recipe.divergence))
        found = {metric: card.thresholds[metric] for metric in card.thresholds if metric != "kl" or same_kl}
    if recipe.trigger.calibration:
        found |= _calibration(recipe, Path(recipe.trigger.calibration))
    return found


def with_router(recipe: Recipe) -> Recipe:
    """The recipe with R2R's router, where it has one, as an absolute path. Raises RecipeError where there is none, or
    it was trained for another SLM."""
    if recipe.router.path is None:
        return recipe
    path = Path(recipe.router.path)
    if not (path / SETTINGS).is_file():
        raise RecipeError(f"router.path: {path} holds no router; `s2t distil --objective router` trains one")
    _same_weights("router.path", path, "SLM", read_provenance(path).get("base_weights"), recipe.slm)
    router = recipe.router.model_copy(update={"path": str(path.resolve())})
    return recipe.model_copy(update={"router": router})


def _artifact(recipe: Recipe) -> Artifact:
    try:
        artifact = Artifact.load(str(recipe.artifact))
    except ArtifactError as error:
        raise RecipeError(f"artifact: {error}") from None
    card = artifact.card
    _same_weights("artifact", artifact.folder, "SLM", card.provenance.get("base_weights"), recipe.slm)
    for key, trained, here in (
        ("distil.temperature", card.temperature, recipe.distil.temperature),
        ("policies.local_prior_weight", card.prior_weight, recipe.policies.local_prior_weight),
    ):
        if trained != here:
            raise RecipeError(
                f"artifact: {artifact.folder} was made for {key} = {trained:g}, the recipe says {here:g}; set {key}={trained:g} "
                "(a policy's name takes another prior weight, as in s2t-local-w0)"
            )
    return artifact


def calibration(path: Path) -> dict[str, Any]:
    """What `s2t collect` wrote as thresholds.json, in the folder or file `path`. Raises RecipeError where it is none."""
    path = path / "thresholds.json" if path.is_dir() else path
    if not path.is_file():
        raise RecipeError(f"trigger.calibration: {path}: no such file; `s2t collect` writes one")
    try:
        content = json.loads(path.read_text())
        missing = [
            key for key in ("kl", "entropy", "task", "rows", "slm", "teacher", "divergence") if key not in content
        ]
    except (ValueError, TypeError) as error:
        raise RecipeError(f"trigger.calibration: {path}: not valid JSON: {error}") from None
    if missing:
        raise RecipeError(f"trigger.calibration: {path}: lacks {', '.join(missing)}; `s2t collect` writes such a file")
    return content


def _calibration(recipe: Recipe, path: Path) -> dict[str, dict[str, float]]:
    content = calibration(path)
    _same_weights("trigger.calibration", path, "SLM", content.get("slm"), recipe.slm)
    _same_weights("trigger.calibration", path, "teacher", content.get("teacher"), recipe.teacher)
    if content.get("divergence") != str(recipe.divergence):
        raise RecipeError(
            f"trigger.calibration: {path} holds thresholds of {content.get('divergence')}, the recipe's divergence is "
            f"{recipe.divergence}; collect with this one"
        )
    return {metric: content[metric] for metric in ("kl", "entropy")}


def _same_weights(key: str, path: Path, role: str, recorded: str | None, model: Model) -> None:
    if recorded != loading.weights_hash(model):
        raise RecipeError(f"{key}: {path} was made with another {role} than {model.path}; make it again with this one")


def _absolute(settings: Model) -> Model:
    path = Path(settings.path)
    return settings.model_copy(update={"path": str(path.resolve())}) if path.is_dir() else settings
