"""The recipe: a model pair with all settings, one typed, validated YAML file read by pipelines and serving alike.

    load_recipe("embedded", ["budget=0.05", "collect.prompts=200"])

Unknown keys and bad values are refused by name. The recipe knows nothing of Ray; resource numbers are plain numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from s2t_models.errors import UserError
from s2t_models.settings import (
    BenchmarkSettings,
    CalibrationSettings,
    CandidateSettings,
    CollectSettings,
    DivergenceSettings,
    ModelSettings,
    PolicySettings,
    ReservedSettings,
    ServingSettings,
    Settings,
    TriggerSettings,
    ValidationSettings,
)
from s2t_models.storage import Location, location
from s2t_models.training_settings import DistilSettings, RouterSettings, TriggerHeadSettings

#: What no further checkpoint can be called.
ENGINES = {"slm", "teacher", "s2t-local"}
#: What is served beside the recipe's own is called in the names of policies, engines and files, and by `--set`.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class RecipeError(UserError):
    """A recipe that cannot be used; the message is one line naming the key."""


class Recipe(Settings):
    """A model pair with all settings. `budget` tau is the share of steps that may be triggered. `prompts` says in whose
    words tasks ask: their own (those of Qwen2.5-Math's and MMLU-Pro's evaluations), or the authors' code's."""

    name: str
    slm: ModelSettings
    teacher: ModelSettings
    artifact: str | None = None
    artifacts: dict[str, str] = Field({})
    routers: dict[str, str] = Field({})
    checkpoints: dict[str, str] = Field({})
    tah: str | None = None
    budget: Annotated[float, Field(gt=0, le=1)] = 0.01
    seed: int = Field(0, ge=0)
    published: Annotated[bool, Field(strict=True)] = False
    prompts: Literal["own", "published"] = "own"
    reserved: ReservedSettings = ReservedSettings()
    divergence: DivergenceSettings = DivergenceSettings()
    candidates: CandidateSettings = CandidateSettings()
    trigger: TriggerSettings = TriggerSettings()
    collect: CollectSettings = CollectSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    distil: DistilSettings = DistilSettings()
    trigger_head: TriggerHeadSettings = TriggerHeadSettings()
    policies: PolicySettings = PolicySettings()
    router: RouterSettings = RouterSettings()
    serving: ServingSettings = ServingSettings()
    validation: ValidationSettings = ValidationSettings()
    benchmark: BenchmarkSettings = BenchmarkSettings()

    @model_validator(mode="before")
    @classmethod
    def as_published(cls, values: Any) -> Any:
        """`published: true` takes the choices of the published code: KL renormalised on the SLM's top 64, no trigger in
        the first 3 steps, candidates by top-K."""
        if not (isinstance(values, dict) and values.get("published") is True):
            return values
        forced: dict[str, dict[str, Any]] = {
            "divergence": {"support": 64, "tail": "renormalised"},
            "candidates": {"method": "top_k"},
            "trigger": {"warmup": 3},
        }
        sections = {key: values.get(key) or {} for key in forced}
        if not all(isinstance(section, dict) for section in sections.values()):
            return values  # which validation refuses by name
        return values | {key: {**sections[key], **choice} for key, choice in forced.items()}

    @model_validator(mode="after")
    def fits_together(self) -> Recipe:
        """Raises ValueError where settings that are fine alone contradict each other."""
        for section in ("candidates", "collect"):
            if (k := getattr(self, section).k) > self.divergence.support:
                raise ValueError(
                    f"{section}.k = {k}: candidates come from the {self.divergence.support} tokens of "
                    "divergence.support"
                )
        if (top := self.distil.two_stage.top) > self.divergence.support:
            raise ValueError(
                f"distil.two_stage.top = {top}: the teacher's tokens come from the {self.divergence.support} of "
                "divergence.support"
            )
        for section in ("artifacts", "routers", "checkpoints"):
            for name in getattr(self, section):
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{section}.{name}: a name has letters, digits, dashes and underscores, and begins with a "
                        "letter or a digit"
                    )
        if taken := sorted(ENGINES & self.checkpoints.keys()):
            raise ValueError(f"checkpoints.{taken[0]}: that is the name of an engine of every recipe; choose another")
        for stage, role in (("rollout", "slm"), ("label", "teacher")):
            if getattr(self, role).engine == "vllm" and getattr(self.collect, stage).num_gpus:
                raise ValueError(
                    f"collect.{stage}.num_gpus: leave it out with {role}.engine vllm, whose GPUs follow from "
                    f"{role}.vllm"
                )
        return self

    def changed(self, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe with other values of `a.b` settings. Raises RecipeError naming every wrong one."""
        values = self.model_dump(mode="json")
        for key, value in overrides.items():
            _set(values, f"{key}={json.dumps(value)}")
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            raise RecipeError(_one_line(error)) from None

    def calibrating(self) -> Recipe:
        """The recipe that collects its calibration prompts: what thresholds are percentiles of is greedy decoding."""
        chosen = {
            "writer": "slm",
            "task": self.calibration.task,
            "prompts": self.calibration.prompts,
            "sampled": 0.0,
        }
        return self.model_copy(update={"collect": self.collect.model_copy(update=chosen)})

    def calibrated_by(self, collection: Location) -> Recipe:
        """The recipe that collects its training prompts beside that collection of its calibration prompts: S2T, where
        it writes, takes its threshold from it, unless the recipe names another."""
        if self.collect.writer != "s2t" or self.trigger.calibration or self.trigger.threshold is not None:
            return self
        trigger = self.trigger.model_copy(update={"calibration": str(collection)})
        return self.model_copy(update={"trigger": trigger})

    def by_teacher(self) -> Recipe:
        """The recipe that collects the teacher's own answers to the training prompts, with its best tokens at every
        step: what the objective `distil` learns from."""
        chosen = {
            "writer": "teacher",
            "steps": 1.0,
            "random_steps": 0.0,
            "k": self.distil.two_stage.top,
            "method": "top_k",
        }
        return self.model_copy(update={"collect": self.collect.model_copy(update=chosen)})

    def as_yaml(self) -> str:
        """The text that `load_recipe` reads it from."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def digest(self) -> str:
        """sha256 of the whole recipe, recorded with every result."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, key in enumerate(keys):
            if key.value in {other.value for other in keys[:place]}:
                raise yaml.composer.ComposerError(None, None, f"{key.value} is there twice", key.start_mark)
        return node


def load_recipe(path: str | Location, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides (values are YAML) and validate it.

    `path` is a YAML file, by path or URI, or the bare name of a recipe that ships with the project, such as "embedded".
    Relative paths of folders are made absolute here, once: processes of the stages run in folders of their own. Raises
    RecipeError with one line that names the file and every wrong key.
    """
    try:
        values = yaml.load(_find(path).read_bytes(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings")
    for override in overrides:
        _set(values, override)
    try:
        return _absolute(Recipe.model_validate(values))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from None


def _absolute(recipe: Recipe) -> Recipe:
    def of(path: str | None) -> str | None:
        return path if path is None or not Path(path).exists() else str(Path(path).resolve())

    def to_write(path: str | None) -> str | None:
        return path and str(Path(path).absolute())

    def model(settings: ModelSettings) -> ModelSettings:
        return settings.model_copy(update={"path": of(settings.path)})

    return recipe.model_copy(
        update={
            "slm": model(recipe.slm),
            "teacher": model(recipe.teacher),
            "artifact": of(recipe.artifact),
            "tah": of(recipe.tah),
            **{
                section: {name: of(path) for name, path in getattr(recipe, section).items()}
                for section in ("artifacts", "routers", "checkpoints")
            },
            "router": recipe.router.model_copy(update={"path": of(recipe.router.path)}),
            "trigger": recipe.trigger.model_copy(update={"calibration": of(recipe.trigger.calibration)}),
            "serving": recipe.serving.model_copy(
                update={"keys_file": of(recipe.serving.keys_file), "access_log": to_write(recipe.serving.access_log)}
            ),
        }
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes that ship with the project, by name (`embedded`, `paper/qwen2.5-1.5b-32b`): the files of the data
    package `cluster`, where it is installed."""
    try:
        folder = Path(str(files("cluster") / "recipes"))
    except ModuleNotFoundError:
        return {}
    return {str(path.relative_to(folder).with_suffix("")): path for path in sorted(folder.rglob("*.yaml"))}


def _find(path: str | Location) -> Location:
    """The recipe's file. A file that is there comes before a shipped recipe of the same name."""
    if location(path).is_file():
        return location(path)
    shipped = shipped_recipes()
    if str(path) in shipped:
        return shipped[str(path)]
    raise RecipeError(f"{path}: no such recipe file; recipes that ship, by name: {', '.join(shipped) or 'none'}")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: expected a.b=value")
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"--set {override}: {parent} is not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override}: the value is not valid YAML") from None


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"unknown key {key}")
        elif problem["type"] == "value_error" and not key:
            problems.append(str(problem["ctx"]["error"]))
        elif problem["type"] == "missing":
            problems.append(f"missing key {key}")
        else:
            problems.append(f"{key} = {json.dumps(problem['input'], default=str)}: {problem['msg'].lower()}")
    return "; ".join(problems)
