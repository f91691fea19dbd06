"""What a recipe hosts, resolved and checked once: its engines, the thresholds of its policies, R2R's router.

It reads folders and hashes; it knows nothing of engines' code, policies, Ray or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from s2t_models import loading
from s2t_models.artifact import Artifact, ArtifactError, read_provenance
from s2t_models.calibration import Calibration, CalibrationError
from s2t_models.recipe import Recipe, RecipeError
from s2t_models.reserved import describe, masked_rows, reserved_rows
from s2t_models.router import SETTINGS, weights_hash
from s2t_models.second_pass import SecondPass, SecondPassError
from s2t_models.settings import ModelSettings
from s2t_models.storage import Location, location

#: What triggers compare with ("kl", "entropy", "head") -> budget -> the threshold that triggers that share of
#: calibration steps.
Thresholds = Mapping[str, Mapping[float, float]]
#: The engine that holds the artifact.
LOCAL = "s2t-local"


def alongside(engine: str, name: str | None) -> str:
    """What a further artifact or router of the recipe is served as, an engine or a policy: s2t-local:NAME, r2r:NAME.
    None is the recipe's own."""
    return engine if name is None else f"{engine}:{name}"


def beside(engine: str, part: str) -> str:
    """What the weights of a part are called that runs beside an engine's model: slm.router, slm.second_pass."""
    return f"{engine}.{part}"


@dataclass(frozen=True)
class Hosted:
    """One engine, on the device and slots of `settings`: a model, or the S2T-Local artifact in a folder; it never
    generates the masked ids, nor an artifact its own reserved ones. `router` is the folder of R2R's router, and
    `second_pass` that of Think-at-Hard's decider and LoRA, which run beside the SLM."""

    name: str
    settings: ModelSettings
    masked_ids: tuple[int, ...] = ()
    artifact: Location | None = None
    router: Location | None = None
    second_pass: Location | None = None

    @property
    def router_hash(self) -> str | None:
        """sha256 of the router's weights, where there is a router."""
        return None if self.router is None else weights_hash(self.router)

    @property
    def second_pass_hash(self) -> str | None:
        """sha256 of the weights of the second pass, where there is one."""
        return None if self.second_pass is None else SecondPass.load(self.second_pass).weights_hash


@dataclass(frozen=True)
class NamedArtifact:
    """How an artifact decodes that is served beside the recipe's own: `recipe` with its score temperature and prior
    weight, and its thresholds."""

    recipe: Recipe
    thresholds: Thresholds


@dataclass(frozen=True)
class Hosting:
    """A recipe and what it hosts. `digest` is that of the recipe as it was given; `artifacts` are those beside its own,
    by name."""

    recipe: Recipe
    digest: str
    slm: Hosted
    engines: Mapping[str, Hosted]
    thresholds: Thresholds = field(default_factory=dict)
    artifacts: Mapping[str, NamedArtifact] = field(default_factory=dict)

    @property
    def tokenizer(self) -> ModelSettings:
        """The SLM's settings, whose tokenizer every engine shares."""
        return self.slm.settings

    def only(self, names: Collection[str]) -> Hosting:
        """With no other engines than those named."""
        return replace(self, engines={name: engine for name, engine in self.engines.items() if name in names})

    def decoding_with(self, artifact: str) -> Hosting:
        """As it would be with this one of the other artifacts as the recipe's own."""
        other = self.artifacts[artifact]
        return replace(self, recipe=other.recipe, thresholds=other.thresholds)


def host(recipe: Recipe) -> Hosting:
    """Resolve a recipe: slm, teacher, s2t-local where there is an artifact, and each further checkpoint, artifact and
    router; a further router has an SLM of its own to run beside.

    Raises RecipeError where a folder is missing, or tokenizers, weights or thresholds do not belong together.
    """
    engines = pair(recipe)
    slm = engines["slm"]
    for name, path in recipe.checkpoints.items():
        checkpoint = loading.pinned(recipe.slm.model_copy(update={"path": path, "revision": None}))
        engines[name] = Hosted(name, checkpoint, slm.masked_ids)
        _check_tokenizer(engines[name], recipe)
    artifact = _own_artifact(recipe, recipe.artifact) if recipe.artifact else None
    if artifact:
        engines[LOCAL] = replace(slm, name=LOCAL, artifact=artifact.folder.resolve())
    artifacts = {}
    for name, path in recipe.artifacts.items():
        other, engine = _artifact(f"artifacts.{name}", path, recipe), alongside(LOCAL, name)
        engines[engine] = replace(slm, name=engine, artifact=other.folder.resolve())
        artifacts[name] = NamedArtifact(_decoding_as_made(other, recipe), _thresholds(recipe, other))
    if recipe.router.path is not None:
        engines["slm"] = replace(slm, router=_router("router.path", recipe.router.path, recipe))
    if recipe.tah is not None:
        engines["slm"] = replace(engines["slm"], second_pass=_second_pass(recipe.tah, recipe))
    for name, path in recipe.routers.items():
        engine = alongside("slm", name)
        engines[engine] = replace(slm, name=engine, router=_router(f"routers.{name}", path, recipe))
    return Hosting(recipe, recipe.digest(), engines["slm"], engines, _thresholds(recipe, artifact), artifacts)


def trained_folders(recipe: Recipe) -> dict[str, str]:
    """The folders of all that the recipe names and `s2t distil` made, by what an answer calls their weights
    (`engines.load.weights_behind`): artifacts and checkpoints by their engines, and what runs beside an SLM."""
    found = {
        LOCAL: recipe.artifact,
        **{alongside(LOCAL, name): folder for name, folder in recipe.artifacts.items()},
        **recipe.checkpoints,
        beside("slm", "router"): recipe.router.path,
        **{beside(alongside("slm", name), "router"): folder for name, folder in recipe.routers.items()},
        beside("slm", "second_pass"): recipe.tah,
    }
    return {name: folder for name, folder in found.items() if folder}


def pair(recipe: Recipe) -> dict[str, Hosted]:
    """The SLM and the teacher alone. Raises RecipeError where they do not belong together."""
    recipe, masked = pinned(recipe), masked_rows(recipe)
    engines = {name: Hosted(name, getattr(recipe, name), masked) for name in ("slm", "teacher")}
    _check_tokenizer(engines["teacher"], recipe)
    return engines


def collecting(recipe: Recipe) -> Hosting:
    """The pair alone, as collecting needs it; where S2T writes, with the thresholds of `trigger.calibration`. Raises
    RecipeError."""
    engines = pair(recipe)
    thresholds = _thresholds(recipe, None) if recipe.collect.writer == "s2t" else {}
    return Hosting(recipe, recipe.digest(), engines["slm"], engines, thresholds)


def pinned(recipe: Recipe) -> Recipe:
    """With the commits that the hub has now of the SLM and the teacher (see `loading.pinned`)."""
    return recipe.model_copy(update={name: loading.pinned(getattr(recipe, name)) for name in ("slm", "teacher")})


def _check_tokenizer(engine: Hosted, recipe: Recipe) -> None:
    if difference := loading.tokenizer_difference(engine.settings, recipe.slm):
        raise RecipeError(
            f"{engine.name}: the tokenizers of {engine.settings.path} and {recipe.slm.path} are not the same: "
            f"{difference}; models that work together share one"
        )


def _thresholds(recipe: Recipe, artifact: Artifact | None) -> Thresholds:
    """Those of the artifact, and for KL and entropy those of `trigger.calibration` where it is set.

    An artifact's KL thresholds hold for the teacher and the divergence they were calibrated with, and are left out
    beside another."""
    found: dict[str, dict[float, float]] = {}
    if artifact:
        card = artifact.card
        calibrated = (card.provenance.teacher_weights, card.provenance.divergence)
        same_kl = calibrated == (loading.weights_hash(recipe.teacher), str(recipe.divergence))
        found = {metric: card.thresholds[metric] for metric in card.thresholds if metric != "kl" or same_kl}
    if recipe.trigger.calibration:
        found |= _calibration(recipe, location(recipe.trigger.calibration))
    return found


def _router(key: str, path: str, recipe: Recipe) -> Location:
    folder = location(path)
    if not (folder / SETTINGS).is_file():
        raise RecipeError(f"{key}: {folder} holds no router; `s2t distil --objective router` trains one")
    provenance = read_provenance(folder)
    _same_weights(key, folder, "SLM", provenance.base_weights if provenance else None, recipe.slm)
    return folder.resolve()


def _second_pass(path: str, recipe: Recipe) -> Location:
    try:
        folder = SecondPass.load(path).folder
    except SecondPassError as error:
        raise RecipeError(f"tah: {error}") from None
    provenance = read_provenance(folder)
    _same_weights("tah", folder, "SLM", provenance.base_weights if provenance else None, recipe.slm)
    return folder.resolve()


def _artifact(key: str, path: str, recipe: Recipe) -> Artifact:
    try:
        artifact = Artifact.load(path)
    except ArtifactError as error:
        raise RecipeError(f"{key}: {error}") from None
    _same_weights(key, artifact.folder, "SLM", artifact.card.provenance.base_weights, recipe.slm)
    return artifact


def _decoding_as_made(artifact: Artifact, recipe: Recipe) -> Recipe:
    card, policies = artifact.card, recipe.policies
    local = policies.local.model_copy(update={"prior_weight": card.prior_weight})
    distil = recipe.distil.model_copy(update={"temperature": card.temperature})
    return recipe.model_copy(update={"distil": distil, "policies": policies.model_copy(update={"local": local})})


def _own_artifact(recipe: Recipe, path: str) -> Artifact:
    artifact = _artifact("artifact", path, recipe)
    check_decoding(artifact, recipe)
    card = artifact.card
    if card.reserved_ids != (reserved := reserved_rows(recipe)):
        raise RecipeError(
            f"artifact: {artifact.folder} scores with {describe(card.reserved_ids)}, the recipe says "
            f"{describe(reserved)}; set reserved as it was for the artifact, or distil again"
        )
    return artifact


def check_decoding(artifact: Artifact, recipe: Recipe) -> None:
    """Raise RecipeError where the artifact was made to decode with other settings than the recipe's."""
    card = artifact.card
    for key, trained, here in (
        ("distil.temperature", card.temperature, recipe.distil.temperature),
        ("policies.local.prior_weight", card.prior_weight, recipe.policies.local.prior_weight),
    ):
        if trained != here:
            raise RecipeError(
                f"artifact: {artifact.folder} was made for {key} = {trained:g}, the recipe says {here:g}; "
                f"set {key}={trained:g} (a policy's name takes another prior weight, as in s2t-local-w0)"
            )


def calibration(path: Location) -> Calibration:
    """What `s2t collect` wrote as thresholds.json, in the folder or file `path`. Raises RecipeError where it is
    none."""
    try:
        return Calibration.read(path)
    except CalibrationError as error:
        raise RecipeError(f"trigger.calibration: {error}") from None


def _calibration(recipe: Recipe, path: Location) -> dict[str, dict[float, float]]:
    content = calibration(path)
    _same_weights("trigger.calibration", path, "SLM", content.slm, recipe.slm)
    _same_weights("trigger.calibration", path, "teacher", content.teacher, recipe.teacher)
    if content.divergence != str(recipe.divergence):
        raise RecipeError(
            f"trigger.calibration: {path} holds thresholds of {content.divergence}, the recipe's divergence is "
            f"{recipe.divergence}; collect with this one"
        )
    return content.thresholds


def _same_weights(key: str, path: Location, role: str, recorded: str | None, model: ModelSettings) -> None:
    if recorded != loading.weights_hash(model):
        raise RecipeError(f"{key}: {path} was made with another {role} than {model.path}; make it again with this one")
