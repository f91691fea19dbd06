"""The sections of a recipe, but for those of trainings (`training_settings`): each setting with its type, default and
bounds.

Unknown keys and bad values are refused. A policy, an engine or a training holds its section as it is. Resource numbers
are plain numbers: nothing here knows of Ray.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
#: A model of the pair.
Role = Literal["slm", "teacher"]
#: Who writes a collection's texts: a model of the pair, or S2T, which is the SLM with the teacher choosing where they
#: diverge (Algorithm 1).
Writer = Literal["slm", "teacher", "s2t"]
#: Candidates of one step at most: an engine keeps room for as many leaves.
MOST_CANDIDATES = 64


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VllmSettings(Settings):
    """What vLLM needs beyond the model's own settings. One engine takes `tensor_parallel` times `pipeline_parallel`
    GPUs. `max_num_seqs` requests run at once (None: `slots`). `extra` is passed to vLLM's engine arguments by
    name."""

    tensor_parallel: Count = 1
    pipeline_parallel: Count = 1
    quantisation: str | None = None
    gpu_memory_utilisation: float = Field(0.9, gt=0, le=1)
    max_num_seqs: Count | None = None
    extra: dict[str, Any] = {}

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class ModelSettings(Settings):
    """Where a model's weights are: a folder, a hub name with its revision, or `embedded:slm` / `embedded:teacher`; and
    the `engine` that runs it. The torch engine's GPUs are `num_gpus`; those of vLLM follow from its parallel sizes.
    Served, it has `num_replicas`; with `max_replicas`, as many up to that as its load asks for."""

    path: str
    engine: str = "torch"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    slots: Count = 32
    context: Count | None = None
    num_replicas: Count = 1
    max_replicas: Count | None = None
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _gpus_follow(self) -> ModelSettings:
        if self.engine == "vllm" and self.num_gpus:
            raise ValueError("num_gpus: leave it out with engine vllm, whose GPUs follow from its parallel sizes")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas = {self.max_replicas} is below num_replicas = {self.num_replicas}")
        return self

    @property
    def gpus(self) -> float:
        """GPUs that one engine takes."""
        if self.engine != "vllm":
            return self.num_gpus
        return 0 if self.device == "cpu" else self.vllm.tensor_parallel * self.vllm.pipeline_parallel


class ReservedSettings(Settings):
    """The R rows that carry scores (section 3.2, D.1). `kind` "rows": rows of the vocabulary that no text uses, the
    block from `first` on, or the highest free ones. "head": a ranking head beside the vocabulary. "auto": the first
    where there are enough free rows, else the second."""

    kind: Literal["auto", "rows", "head"] = "auto"
    count: Count = 16
    first: int | None = Field(None, ge=0)


class DivergenceSettings(Settings):
    """KL(SLM || teacher) on the SLM's top `support` tokens; `renormalised` is the published code's variant."""

    support: Count = 64
    tail: Literal["bucket", "renormalised"] = "bucket"

    def __str__(self) -> str:
        """What shards and thresholds record: values of different divergences are not compared."""
        return self.on_texts_of("slm")

    def on_texts_of(self, writer: Writer) -> str:
        """That of a collection: the KL goes from the model that wrote to the one that read."""
        pair = "teacher || SLM" if writer == "teacher" else "SLM || teacher"
        return f"KL({pair}), top {self.support}, {self.tail}"


class CandidateSettings(Settings):
    """How C_t is made (section 4.2): from the SLM's distribution at `temperature`, cut to the likeliest tokens that
    hold `top_p` of it (Table A15); `ratio` > 0 makes the set dynamic (Table A4)."""

    k: int = Field(8, ge=1, le=MOST_CANDIDATES)
    method: Literal["top_k", "multinomial"] = "multinomial"
    ratio: Fraction = 0.0
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)


class TriggerSettings(Settings):
    """When a step counts as critical. `threshold` null: from `calibration` at the recipe's budget. `head_threshold` is
    one for the trigger head, as a probability: S2T-Local then triggers wherever the head says so, at whatever budget
    that comes to."""

    metric: Literal["kl", "entropy", "random"] = "kl"
    threshold: float | None = None
    calibration: str | None = None
    head_threshold: float | None = Field(None, gt=0, lt=1)
    warmup: int = Field(0, ge=0)


class ActorPool(Settings):
    """A pool of actors: how many, and what each takes of the cluster."""

    actors: Count = 1
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    batch: Count = 32


class CollectSettings(Settings):
    """Rollouts and labels (section 4.3, D.2). Of the pair the `writer` rolls out, and the other one reads. Where S2T
    writes, the SLM drafts up to `chunk` tokens at once, and the teacher labels and chooses in the same reading: of
    longer drafts more is read in vain."""

    writer: Writer = "slm"
    task: str = "embedded-train"
    prompts: Count = 2400
    max_new_tokens: Count = 256
    chunk: Count = 8
    sampled: Fraction = 0.5
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    steps: Fraction = 0.10
    random_steps: Fraction = 0.10
    k: int = Field(16, ge=1, le=MOST_CANDIDATES)
    method: Literal["top_k", "multinomial"] = "multinomial"
    rollout: ActorPool = ActorPool()
    label: ActorPool = ActorPool()

    @property
    def drafter(self) -> Role:
        """The model that rolls out."""
        return "teacher" if self.writer == "teacher" else "slm"

    @property
    def reader(self) -> Role:
        """The model that reads what is rolled out."""
        return "slm" if self.writer == "teacher" else "teacher"

    def pool(self, role: Role) -> ActorPool:
        """The actors that hold this model: those of rollouts the SLM, those of labels the teacher, whoever writes."""
        return self.rollout if role == "slm" else self.label


class CalibrationSettings(Settings):
    """The prompts that thresholds are set on: rolled out greedily, and never trained on."""

    task: str = "embedded-calibration"
    prompts: Count = 400


class ValidationSettings(Settings):
    """The problems that `s2t loop` chooses the budget on, among `budgets`; without a `task` the recipe's stays."""

    task: str | None = None
    items: Count = 200
    budgets: Annotated[tuple[float, ...], Field(min_length=1)] = (0.01, 0.02, 0.05, 0.10)


class SamplerSettings(Settings):
    """How a policy draws tokens unless the request says otherwise; temperature 0 is greedy, `top_k` 0 leaves it out."""

    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


class LocalSettings(Settings):
    """S2T-Local. `prior_weight` w > 0 keeps the SLM's own ranking in play beside the score; 0 is the paper's rule."""

    prior_weight: float = Field(0.0, ge=0)


class MajoritySettings(Settings):
    """Maj@n as it is listed; any n can be asked for by name."""

    votes: int = Field(8, ge=1, le=128)


class SpecReasonSettings(Settings):
    """SpecReason. A step ends at `delimiter` (a blank line in the published code) or after `step_tokens`; it is
    accepted at a score of `accept` or more. `score` is the likeliest digit, or the mean over the ten digits'
    probabilities."""

    accept: int = Field(7, ge=0, le=9)
    delimiter: str = Field("\n\n", min_length=1)
    step_tokens: Count = 512
    score: Literal["greedy", "expected"] = "greedy"
    sampler: SamplerSettings = SamplerSettings(temperature=0.6, top_p=0.95)


class MultiplexSettings(Settings):
    """Multiplex Thinking: each input is the mean embedding of `width` draws until the text turns certain.

    After `patience` steps in a row with an entropy below `entropy` nats, decoding goes on with ordinary sampling."""

    width: Count = 3
    temperature: float = Field(1.0, gt=0)
    weighted: bool = True
    entropy: float = Field(0.1, ge=0)
    patience: Count = 256


class TahSettings(Settings):
    """Think-at-Hard. A token whose decider gives more than `threshold` takes a second pass."""

    threshold: Fraction = 0.9
    sampler: SamplerSettings = SamplerSettings(temperature=0.6, top_p=0.95, top_k=20)


class PolicySettings(Settings):
    """What policies share (`chunk`: the longest draft that is judged at once) and what each has of its own, with the
    published defaults. `sample` also draws the samples of maj@n and what Multiplex goes on with."""

    chunk: Count = 16
    sample: SamplerSettings = SamplerSettings(temperature=0.7, top_p=0.8, top_k=20)
    llm_sample: SamplerSettings = SamplerSettings(temperature=0.6, top_p=0.95)
    majority: MajoritySettings = MajoritySettings()
    local: LocalSettings = LocalSettings()
    specreason: SpecReasonSettings = SpecReasonSettings()
    multiplex: MultiplexSettings = MultiplexSettings()
    tah: TahSettings = TahSettings()


class ServingSettings(Settings):
    """The endpoint. Its HTTP proxies are on the head node, or on `every node` that runs a replica, for a load balancer
    before them. It has `gateway_replicas`; with `gateway_max_replicas`, as many up to that as its load asks for.
    `keys_file` holds lines `name: key`; without it and without S2T_API_KEYS everyone may ask. A request's body may have
    `max_body_mb`, its answer take `request_timeout_s`; when the endpoint ends, what is in flight has `drain_s`.
    `access_log` is a file of JSON lines on the gateway's node."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    proxies: Literal["head", "every node"] = "head"
    gateway_replicas: Count = 1
    max_waiting: Count = 64
    gateway_max_replicas: Count | None = None
    keys_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_mb: float = Field(4.0, gt=0)
    request_timeout_s: float = Field(600.0, gt=0)
    drain_s: float = Field(30.0, ge=0)
    access_log: str | None = None

    @model_validator(mode="after")
    def _most_is_not_below_least(self) -> ServingSettings:
        if self.gateway_max_replicas is not None and self.gateway_max_replicas < self.gateway_replicas:
            raise ValueError(
                f"gateway_max_replicas = {self.gateway_max_replicas} is below gateway_replicas = "
                f"{self.gateway_replicas}"
            )
        return self


class BenchmarkSettings(Settings):
    """What a job asks: `items` rows of each task, 0 for all. `max_new_tokens` is an answer's limit where it is below
    the task's own."""

    task: Annotated[tuple[str, ...], Field(min_length=1)] = ("embedded",)
    items: int = Field(600, ge=0)
    max_new_tokens: Count | None = None
    policies: Annotated[tuple[str, ...], Field(min_length=1)] = (
        *("greedy", "maj@8", "takeover", "s2t", "s2t-local", "s2t-local-w0", "kd", "llm"),
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    concurrency: Count = 32
