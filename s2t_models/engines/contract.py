"""What an engine is: token ids in, token ids and log-probabilities out.

The core is `Engine`: card, generate, score, close. Everything beyond it is a capability that the card lists, with a
protocol of its own: `Selecting` here, mean-embedding inputs beside Multiplex, the router beside R2R, second passes
beside Think-at-Hard. A policy that needs a capability is offered only where the engine has it.

Calls carry their whole prefix and are asynchronous, so no policy manages a cache, any replica can serve any call, and
batching is the engine's business. An engine belongs to the event loop of its first call; all its calls come from there.
The contract knows nothing of policies or HTTP, and of text only the stop texts at which a draft ends.

Axes: _T step, _N support (the top-N of a step), _K candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from s2t_models.settings import CandidateSettings

Finish = Literal["end", "length", "trigger", "stop"]

#: What an engine may have beyond the core:
#: select         scores of candidates, and `generate` that stops at the trigger head (`Selecting`)
#: fused_select   the whole S2T-Local loop in one call (`FusedSelecting`)
#: entropy        the entropy of the whole vocabulary at every step of a support
#: seeded_noise   the same (seed, step) draws the same token whatever else the engine is doing
#: multiplex      mean embeddings as inputs (`policies.multiplex.MultiplexEngine`)
#: features       inputs of R2R's router, to train one (`policies.r2r.FeatureEngine`)
#: route          R2R's router itself (`policies.r2r.RoutingEngine`)
#: second_pass    second passes at hard tokens (`policies.tah.SecondPassEngine`)
Capability = Literal[
    "select", "fused_select", "entropy", "seeded_noise", "multiplex", "features", "route", "second_pass"
]


@dataclass(frozen=True)
class Penalties:
    """What it costs a token to come again, taken off its logit before the temperature.

    `presence` and `frequency`, as OpenAI has them, go by the output alone: the first is taken off once where the token
    was written, the second as often as it was. `repetition`, as transformers has it, goes by prompt and output: the
    logit of a token that is there is divided by it where it is positive, else multiplied. Negative ones, and a
    repetition below 1, make tokens come again. Raises ValueError where the repetition is not positive."""

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    def __post_init__(self) -> None:
        if not self.repetition > 0.0:
            raise ValueError(f"repetition penalty = {self.repetition}: it is above 0, and 1 changes nothing")

    def __bool__(self) -> bool:
        """Whether they change anything."""
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


NO_PENALTIES = Penalties()


@dataclass(frozen=True)
class Sampling:
    """How `generate` picks tokens, and when it stops.

    `temperature` 0 is greedy. `first_step` is the step of the first token generated: a draft that goes on where another
    stopped passes the number of tokens decoded so far, so that the noise of a step depends on (seed, step) alone.
    `top_p`, `top_k` (0: all) and `min_p` (a share of the best token's probability) leave out what is less probable.
    `penalties` change which token is picked, greedily or not; log-probabilities stay the model's own. `support` asks
    for the top-N ids and log-probabilities of every step (0: none).

    The output began `first_step` tokens before the end of the prefix: penalties and stop texts see it whole. The draft
    ends with the token that completes one of the `stop` texts in it.

    With `trigger_threshold` the draft stops *before* the first step, from step `trigger_warmup` on, whose trigger-head
    logit reaches it; the top `trigger_support` tokens of that step come with it. Needs the capability "select", and
    takes no penalties.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    penalties: Penalties = NO_PENALTIES
    seed: int = 0
    first_step: int = 0
    stop: tuple[str, ...] = ()
    support: int = 0
    trigger_threshold: float | None = None
    trigger_warmup: int = 0
    trigger_support: int = 64


@dataclass(frozen=True)
class Selection:
    """Settings of the S2T-Local loop: when it triggers, what it proposes, how it chooses (Eqs. 4, 5 and 9).

    `threshold` is on the trigger head's logit. The chosen candidate maximises the preference
    score / temperature + prior_weight * log p_SLM(c); `prior_weight` 0 is the paper's rule.
    """

    threshold: float
    candidates: CandidateSettings
    prior_weight: float = 0.0
    temperature: float = 0.1
    warmup: int = 0

    def preferences(self, scores_K: np.ndarray, logprobs_K: np.ndarray) -> np.ndarray:
        """What the choice maximises, [K]."""
        return scores_K / self.temperature + self.prior_weight * logprobs_K


@dataclass
class Usage:
    """What calls cost one model. `prefill` counts prompt or draft tokens run through the model to be read,
    `decode` tokens it generated, `leaves` candidate leaves it scored, `forwards` the passes those took part in."""

    prefill: int = 0
    decode: int = 0
    leaves: int = 0
    forwards: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prefill + other.prefill,
            self.decode + other.decode,
            self.leaves + other.leaves,
            self.forwards + other.forwards,
        )


@dataclass
class Decision:
    """What happened at one triggered step: `value` is the trigger's, `scores_K` the scorer's (teacher probabilities or
    reserved-row scores), `preferences_K` what the choice maximised. Where a teacher was asked, `teacher_K` are its
    probabilities of the candidates and `argmax` is its own choice."""

    step: int
    value: float
    candidates_K: list[int]
    logprobs_K: list[float]
    scores_K: list[float]
    preferences_K: list[float]
    chosen: int
    argmax: int | None = None
    teacher_K: list[float] | None = None


@dataclass
class Support:
    """The most probable tokens of each step, best first: ids and log-probabilities [T, N] over the whole vocabulary,
    and the entropy [T] of the whole distribution in nats where the engine has the capability "entropy"."""

    ids_TN: np.ndarray
    logprobs_TN: np.ndarray
    entropy_T: np.ndarray | None = None


@dataclass
class Triggered:
    """The step that a draft stopped before: the trigger head's logit, and the step's most probable tokens, best first,
    [N] each."""

    value: float
    ids_N: np.ndarray
    logprobs_N: np.ndarray


@dataclass
class Draft:
    """Generated tokens. With finish "end" the last id is the end-of-text token, with "stop" the one that completed a
    stop text; with "trigger" `triggered` says what stopped it, and there may be no token. `support` is there where it
    was asked for, `decisions` where the engine ran the S2T-Local loop."""

    ids: list[int]
    finish: Finish
    usage: Usage
    support: Support | None = None
    triggered: Triggered | None = None
    decisions: list[Decision] = field(default_factory=list)

    @property
    def supported(self) -> Support:
        """The support of a draft that was asked for one. Raises ValueError where there is none."""
        if self.support is None:
            raise ValueError("the draft has no support: Sampling.support was 0")
        return self.support


@dataclass
class Written:
    """A part of a draft under way: the tokens since the last part, the support of their steps where it was asked for,
    and the decisions taken."""

    ids: list[int]
    support: Support | None = None
    decisions: list[Decision] = field(default_factory=list)


#: Called with each part of a draft as it is written, on the event loop of the call. The parts make up the draft.
Tell = Callable[[Written], None]


@dataclass
class Scores:
    """`logprobs_TN` of the ids asked for and `argmax_T` over the whole vocabulary, one row a position; with them the
    rows' `support` where it was asked for, without entropies."""

    logprobs_TN: np.ndarray
    argmax_T: np.ndarray
    usage: Usage
    support: Support | None = None


@dataclass
class Selected:
    """The selector's scores of candidates, v . softmax(z[R]) in [0, 1], [K] (Eq. 5), and what they cost."""

    scores_K: np.ndarray
    usage: Usage


@dataclass
class Routed:
    """R2R's router over a draft: p(the token makes the text diverge), [T] float32, and what reading the draft cost."""

    probabilities_T: np.ndarray
    usage: Usage


@dataclass(frozen=True)
class ModelCard:
    """Who an engine is, as recorded with every result. Hashes are sha256 of the weights and of what the tokenizer
    means."""

    name: str
    weights: str
    tokenizer: str
    vocabulary: int
    context: int
    end_ids: tuple[int, ...]
    masked_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    engine: str = "torch"
    router: str | None = None
    second_pass: str | None = None
    capabilities: frozenset[Capability] = frozenset()


class ContextOverflow(ValueError):
    """The prefix and what is to be generated do not fit the model's context."""


class EngineDied(RuntimeError):
    """What the engine runs in has ended or is stuck: it answers nothing any more, and has to be started again."""


@runtime_checkable
class Engine(Protocol):
    """A model that can be called from many coroutines at once. Raises `ContextOverflow` where a call does not fit."""

    async def card(self) -> ModelCard: ...

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        """Decode from `prefix` until the end token, a stop text, `max_tokens`, or the trigger."""
        ...

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        """Row t: log p(ids_TN[t] | tokens[:start + t]), from one forward over the tokens not yet cached, and the
        `support` most probable ids there.

        `start >= 1` and `start + T - 1 <= len(tokens)`: the last row may lie one past the last token."""
        ...

    def close(self) -> None:
        """Free the model; calls still running are cancelled."""
        ...


@dataclass(frozen=True)
class Counted:
    """Tokens of all calls since the engine was loaded: `written` by it, `read` to go on from or to be scored, and
    `cached` ones that it need not read again; and `running`, the calls that are under way."""

    written: int = 0
    read: int = 0
    cached: int = 0
    running: int = 0


@runtime_checkable
class CountsTokens(Protocol):
    """An engine that counts what it does; the counts may be read from any thread."""

    @property
    def counted(self) -> Counted: ...


@runtime_checkable
class HasHealth(Protocol):
    """An engine that runs in processes or a thread of its own, which may end, or stick, before it is closed."""

    async def check_health(self) -> None:
        """Raise EngineDied where they have. Answers at once, whatever the engine is doing."""
        ...


@runtime_checkable
class Selecting(Protocol):
    """Capability "select": an engine that holds an S2T-Local artifact."""

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        """The scores after each candidate."""
        ...


@runtime_checkable
class FusedSelecting(Protocol):
    """Capability "fused_select": the S2T-Local loop inside the engine, where the scoring pass is the next decode step.
    The text is that of the loop over `generate` and `select` (`policies.local`)."""

    async def generate_selecting(
        self, prefix: list[int], sampling: Sampling, selection: Selection, tell: Tell | None = None
    ) -> Draft: ...
