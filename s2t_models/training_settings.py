"""The sections of a recipe that trainings take: `distil` with what single objectives have of their own, the trigger
head, and R2R's router.

They are made as the other sections are (`settings`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from s2t_models.settings import MOST_CANDIDATES, Count, Fraction, Settings


class LoraSettings(Settings):
    """`targets` are the ends of linear layers' names, such as q_proj; none: all layers but the output embedding."""

    rank: Count = 64
    alpha: float = Field(128, gt=0)
    dropout: Fraction = 0.05
    targets: tuple[str, ...] = ()


class TahTraining(Settings):
    """What Think-at-Hard trains beside `distil`'s own settings, with the published ones.

    `lora` acts from the second pass on. Its input is the mean embedding of the `support` likeliest tokens. The decider
    reads as many top logits and the hidden states at these `depths`, as shares of the layers, and is trained with
    positives that weigh `positive_weight`, `batch` trajectories at a time. Of more than `most_steps` steps, it gets
    those of as many trajectories as hold that many."""

    lora: LoraSettings = LoraSettings(rank=32, alpha=64, dropout=0.1)
    support: Count = 100
    depths: Annotated[tuple[Fraction, ...], Field(min_length=1)] = (0.07, 0.36, 0.64, 0.93)
    width: Count = 512
    blocks: Count = 6
    expansion: Count = 4
    dropout: Fraction = 0.1
    positive_weight: float = Field(5.4, gt=0)
    learning_rate: float = Field(3e-5, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    batch: Count = 16
    epochs: Count = 2
    most_steps: Count = 250_000


class TwoStageSettings(Settings):
    """`distil`, DistilQwen2.5's way: for the share `supervised` of the steps cross-entropy on the teacher's texts, then
    beside it the forward KL of the teacher's `top` tokens, which has the weight `kl` and leaves the rest to the
    cross-entropy. `top` is also how many of the teacher's tokens `s2t collect --teacher` keeps of every step."""

    learning_rate: float = Field(2e-5, gt=0)
    warmup: Fraction = 0.1
    supervised: Fraction = 0.5
    kl: Fraction = 0.1
    top: int = Field(10, ge=1, le=MOST_CANDIDATES)


class TsdKdSettings(Settings):
    """`tsd-kd` (Kim and Baek, 2026), with the published code's values. Rollouts are drawn at `temperature`, for
    `refresh` steps at a time with the weights of the first of them. `beta` is the teacher's share of the mixture in the
    Jensen-Shannon divergence; `entropy` weights the student's entropy at the `entropy_share` of each text's steps where
    it is highest, and `ranking` the ranking of its `ranking_k` best tokens, in the opening of each text: the steps that
    hold its first `opening` of entropy."""

    learning_rate: float = Field(5e-6, gt=0)
    warmup: Fraction = 0.1
    temperature: float = Field(1.0, gt=0)
    refresh: Count = 4
    beta: float = Field(0.9, gt=0, lt=1)
    entropy: float = Field(1.0, ge=0)
    entropy_share: float = Field(0.9, gt=0, le=1)
    ranking: float = Field(0.1, ge=0)
    ranking_k: Count = 10
    opening: Fraction = 0.1


class DistilSettings(Settings):
    """Training (of the selector: Eqs. 6-8, 13, 14). `temperature` is the score temperature, `margin` the weight of the
    pairwise hinge, `beta` that of the KL to the base, `min_teacher_margin` the filter of D.4.

    `micro_batch` packed tokens, padding counted, go through the model at once on each worker (a trajectory that is
    longer goes alone), and a batch's gradient is the same however it is cut; `gradient_checkpointing` computes
    activations again where they do not fit; the frozen base's hidden states are kept in `base_cache_gb` of a worker's
    memory.

    `workers` train, each with a copy of the model and its share of every batch. With `min_workers` a training goes on
    with as many as there is room for, from that number on, and takes in more as nodes join. A training that was killed
    also goes on with another number of workers than it began with.

    `margin_spread` says whose scores' deviation sets the hinge's margin (Eq. 14): those of the group itself, or, as the
    paper has it, of the batch (here of one forward, so that it does depend on the cut). On an earlier, easier
    embedded pair, after 320 steps on 1,600 prompts, "group" gave Agree@1 0.893 and 0.904 on held-out top steps (seeds 0
    and 1) with selection losses 0.355 and 0.291, and "batch" 0.885 and 0.835 with 0.366 and 0.340; so "group" is the
    default.
    """

    lora: LoraSettings = LoraSettings()
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
    steps: Count = 90
    batch: Count = 64
    micro_batch: Count = 4096
    gradient_checkpointing: bool = False
    base_cache_gb: float = Field(2.0, ge=0)
    validation: float = Field(0.1, ge=0, lt=1)
    evaluate_every: Count = 15
    workers: Count = 1
    min_workers: Count | None = None
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    tah: TahTraining = TahTraining()
    two_stage: TwoStageSettings = TwoStageSettings()
    tsd_kd: TsdKdSettings = TsdKdSettings()

    @property
    def fewest_workers(self) -> int:
        """How many workers a training needs at the least."""
        return min(self.min_workers or self.workers, self.workers)


class TriggerHeadSettings(Settings):
    """The trigger head (E.2): a two-layer MLP on the SLM's last hidden state, thresholds set post hoc by percentile. Of
    more than `most_steps` steps, those of as many trajectories are drawn as hold that many."""

    hidden: Count = 128
    dropout: Fraction = 0.1
    positives: Fraction = 0.10
    most_steps: Count = 1_000_000
    epochs: Count = 50
    learning_rate: float = Field(1e-3, gt=0)
    validation: Fraction = 0.1
    seed: int = 42


class RouterSettings(Settings):
    """R2R's router, with the published sizes and training. `path` is the folder of a trained one; `judge` says who
    tells whether two sentences differ in meaning: the teacher, or for generated arithmetic the numbers themselves."""

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
