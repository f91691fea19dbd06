"""The recipe: a model pair with all settings, one typed, validated YAML file read by pipelines and serving alike.

    load_recipe("cluster/recipes/embedded.yaml", ["budget=0.05", "collect.prompts=200"])

Unknown keys and bad values are refused by name. The recipe knows nothing of Ray; resource numbers are plain numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2t_models.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
#: Candidates of one step at most: an engine keeps room for as many leaves.
MOST_CANDIDATES = 64


#: What no further checkpoint can be called.
ENGINES = {"slm", "teacher", "s2t-local"}


class RecipeError(UserError):
    """A recipe that cannot be used; the message is one line naming the key."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Settings):
    """Where a model's weights are: a folder, a hub name with its revision, or `embedded:slm` / `embedded:teacher`."""

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Count = 32
    context: Count | None = None
    num_replicas: Count = 1
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)


class Reserved(Settings):
    """The block of R reserved rows (section 3.2, D.1). `first` null: the highest unused rows of the vocabulary."""

    count: Count = 16
    first: int | None = Field(None, ge=0)


class Divergence(Settings):
    """KL(SLM || teacher) on the SLM's top `support` tokens; `renormalised` is the published code's variant."""

    support: Count = 64
    tail: Literal["bucket", "renormalised"] = "bucket"

    def __str__(self) -> str:
        """What shards and thresholds record: values of different divergences are not compared."""
        return f"KL(SLM || teacher), top {self.support}, {self.tail}"


class Candidates(Settings):
    """How C_t is made (section 4.2, Table A15); `ratio` > 0 makes the set dynamic (Table A4)."""

    k: int = Field(8, ge=1, le=MOST_CANDIDATES)
    method: Literal["top_k", "multinomial"] = "multinomial"
    ratio: Fraction = 0.0


class Trigger(Settings):
    """When a step counts as critical. `threshold` null: from `calibration` at the recipe's budget."""

    metric: Literal["kl", "entropy", "random"] = "kl"
    threshold: float | None = None
    calibration: str | None = None
    warmup: int = Field(0, ge=0)


class Stage(Settings):
    """A pool of actors: how many, and what each takes of the cluster."""

    actors: Count = 1
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    batch: Count = 32


class Collect(Settings):
    """Rollouts and labels (section 4.3, D.2)."""

    task: str = "embedded-train"
    prompts: Count = 2400
    max_new_tokens: Count = 256
    sampled: Fraction = 0.5
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    steps: Fraction = 0.10
    random_steps: Fraction = 0.10
    k: int = Field(16, ge=1, le=MOST_CANDIDATES)
    method: Literal["top_k", "multinomial"] = "multinomial"
    rollout: Stage = Stage()
    label: Stage = Stage()


class Lora(Settings):
    rank: Count = 64
    alpha: float = Field(128, gt=0)
    dropout: Fraction = 0.05
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Distil(Settings):
    """Selector training (Eqs. 6-8, 13, 14). `temperature` is the score temperature, `margin` the weight of the
    pairwise hinge, `beta` that of the KL to the base, `min_teacher_margin` the filter of D.4.

    `margin_spread` says whose scores' deviation sets the hinge's margin (Eq. 14): those of the group itself, or, as the
    paper has it, of the batch (here of one forward: at most 8 trajectories of one worker). On the embedded pair with the
    demo's settings, after 320 steps, "group" gave Agree@1 0.893 and 0.904 on held-out top steps (seeds 0 and 1) with
    selection losses 0.355 and 0.291, and "batch" 0.885 and 0.835 with 0.366 and 0.340; so "group" is the default.
    """

    lora: Lora = Lora()
    temperature: float = Field(0.1, gt=0)
    prior_weight: float = Field(0.0, ge=0)
    margin: float = Field(0.5, ge=0)
    margin_spread: Literal["group", "batch"] = "group"
    beta: float = Field(30.0, ge=0)
    kd_beta: float = Field(1.0, ge=0)
    min_teacher_margin: Fraction = 0.3
    learning_rate: float = Field(1e-4, gt=0)
    warmup: Fraction = 0.03
    weight_decay: float = Field(0.0, ge=0)
    steps: Count = 1200
    batch: Count = 64
    validation: float = Field(0.1, ge=0, lt=1)
    evaluate_every: Count = 200
    workers: Count = 1
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)


class TriggerHead(Settings):
    """The trigger head (E.2): a two-layer MLP on the SLM's last hidden state, thresholds set post hoc by percentile."""

    hidden: Count = 128
    dropout: Fraction = 0.1
    positives: Fraction = 0.05
    epochs: Count = 50
    learning_rate: float = Field(1e-3, gt=0)
    validation: Fraction = 0.1
    seed: int = 42


class Policies(Settings):
    """Settings of the policies that have some, with the published defaults."""

    chunk: Count = 16
    sample_temperature: float = Field(0.7, gt=0)
    sample_top_p: float = Field(0.8, gt=0, le=1)
    sample_top_k: int = Field(20, ge=0)
    llm_temperature: float = Field(0.6, gt=0)
    llm_top_p: float = Field(0.95, gt=0, le=1)
    votes: int = Field(8, ge=1, le=128)
    local_prior_weight: float = Field(0.0, ge=0)
    specreason_accept: int = Field(7, ge=0, le=9)
    specreason_delimiter: str = Field("\n\n", min_length=1)
    specreason_step_tokens: Count = 512
    specreason_temperature: float = Field(0.6, gt=0)
    specreason_top_p: float = Field(0.95, gt=0, le=1)
    specreason_score: Literal["greedy", "expected"] = "greedy"
    multiplex_width: Count = 3
    multiplex_temperature: float = Field(1.0, gt=0)
    multiplex_weighted: bool = True
    multiplex_entropy: float = Field(0.1, ge=0)
    multiplex_patience: Count = 256


class Router(Settings):
    """R2R's router, with the published sizes and training. `path` is the folder of a trained one; `judge` says who tells
    whether two sentences differ in meaning: the teacher, or for generated arithmetic the numbers themselves."""

    path: str | None = None
    prompts: Count = 1000
    max_new_tokens: Count = 1024
    judge: Literal["teacher", "numbers"] = "teacher"
    support: Count = 100
    width: Count = 1024
    blocks: Count = 6
    expansion: Count = 4
    dropout: Fraction = 0.1
    learning_rate: float = Field(5e-5, gt=0)
    weight_decay: float = Field(5e-4, ge=0)
    batch: Count = 1024
    epochs: Count = 50
    patience: Count = 10
    validation: Fraction = 0.1
    recall: Fraction = 0.95
    seed: int = 42


class Serving(Settings):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    gateway_replicas: Count = 1


class Benchmark(Settings):
    task: Annotated[tuple[str, ...], Field(min_length=1)] = ("embedded",)
    items: Count = 600
    policies: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("greedy", "maj@8", "takeover", "s2t", "s2t-local", "s2t-local-w0", "kd", "llm"),
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    concurrency: Count = 32


class Recipe(Settings):
    """A model pair with all settings. `budget` tau is the share of steps that may be triggered."""

    name: str
    slm: Model
    teacher: Model
    artifact: str | None = None
    checkpoints: dict[str, str] = {}
    budget: Annotated[float, Field(gt=0, le=1)] = 0.01
    seed: int = Field(0, ge=0)
    published: Annotated[bool, Field(strict=True)] = False
    reserved: Reserved = Reserved()
    divergence: Divergence = Divergence()
    candidates: Candidates = Candidates()
    trigger: Trigger = Trigger()
    collect: Collect = Collect()
    distil: Distil = Distil()
    trigger_head: TriggerHead = TriggerHead()
    policies: Policies = Policies()
    router: Router = Router()
    serving: Serving = Serving()
    benchmark: Benchmark = Benchmark()

    @model_validator(mode="before")
    @classmethod
    def as_published(cls, values: Any) -> Any:
        """`published: true` takes the choices of the published code: KL renormalised on the SLM's top 64, no trigger in the
        first 3 steps, candidates by top-K."""
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
                    f"{section}.k = {k}: candidates come from the {self.divergence.support} tokens of divergence.support"
                )
        if taken := sorted(ENGINES & self.checkpoints.keys()):
            raise ValueError(f"checkpoints.{taken[0]}: that is the name of an engine of every recipe; choose another")
        return self

    def digest(self) -> str:
        """sha256 of the whole recipe, recorded with every result."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply `a.b=value` overrides (values are YAML) and validate it.

    Raises RecipeError with one line that names the file and every wrong key.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of settings")
    for override in overrides:
        _set(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_one_line(error)}") from None


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
