"""What a recipe hosts: its engines, the thresholds of its policies, and that all of it belongs together.

It reads folders and hashes; it knows nothing of Ray or HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from s2t_models import loading
from s2t_models.artifact import Artifact, ArtifactError, read_provenance
from s2t_models.calibration import Calibration, CalibrationError
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
    tokenizer = loading.tokenizer_hash(recipe.slm)
    slm, reserved = _absolute(recipe.slm), reserved_rows(recipe)
    engines = [Hosted("slm", slm, reserved), Hosted("teacher", _absolute(recipe.teacher), reserved)]
    for name, path in recipe.checkpoints.items():
        checkpoint = recipe.slm.model_copy(update={"path": path, "revision": None})
        engines.append(Hosted(name, _absolute(checkpoint), reserved))
    for engine in engines:
        if loading.tokenizer_hash(engine.settings) != tokenizer:
            raise RecipeError(
                f"{engine.name}: the tokenizer of {engine.settings.path} is not that of {recipe.slm.path}; "
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
    found: dict[str, dict[float, float]] = {}
    if recipe.artifact:
        card = _artifact(recipe).card
        calibrated = (card.provenance.teacher_weights, card.provenance.divergence)
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
    provenance = read_provenance(path)
    _same_weights("router.path", path, "SLM", provenance.base_weights if provenance else None, recipe.slm)
    router = recipe.router.model_copy(update={"path": str(path.resolve())})
    return recipe.model_copy(update={"router": router})


def _artifact(recipe: Recipe) -> Artifact:
    try:
        artifact = Artifact.load(str(recipe.artifact))
    except ArtifactError as error:
        raise RecipeError(f"artifact: {error}") from None
    card = artifact.card
    _same_weights("artifact", artifact.folder, "SLM", card.provenance.base_weights, recipe.slm)
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


def calibration(path: Path) -> Calibration:
    """What `s2t collect` wrote as thresholds.json, in the folder or file `path`. Raises RecipeError where it is none."""
    try:
        return Calibration.read(path)
    except CalibrationError as error:
        raise RecipeError(f"trigger.calibration: {error}") from None


def _calibration(recipe: Recipe, path: Path) -> dict[str, dict[float, float]]:
    content = calibration(path)
    _same_weights("trigger.calibration", path, "SLM", content.slm, recipe.slm)
    _same_weights("trigger.calibration", path, "teacher", content.teacher, recipe.teacher)
    if content.divergence != str(recipe.divergence):
        raise RecipeError(
            f"trigger.calibration: {path} holds thresholds of {content.divergence}, the recipe's divergence is "
            f"{recipe.divergence}; collect with this one"
        )
    return content.thresholds


def _same_weights(key: str, path: Path, role: str, recorded: str | None, model: Model) -> None:
    if recorded != loading.weights_hash(model):
        raise RecipeError(f"{key}: {path} was made with another {role} than {model.path}; make it again with this one")


def _absolute(settings: Model) -> Model:
    path = Path(settings.path)
    return settings.model_copy(update={"path": str(path.resolve())}) if path.is_dir() else settings
