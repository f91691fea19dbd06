"""What an engine is: token ids in, token ids and log-probabilities out.

Calls carry their whole prefix and are asynchronous, so no policy manages a cache, any replica can serve any call
and batching is the engine's business. The contract knows nothing of tokenizers, text, policies or HTTP.

Axes: _T step, _N support (the top-N of a step), _K candidate, _R reserved row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

Finish = Literal["end", "length"]


@dataclass(frozen=True)
class Sampling:
    """How `generate` picks tokens.

    `temperature` 0 is greedy. Noise depends on (seed, step) alone, where the first token generated has step
    `first_step`: a draft that goes on where another stopped passes the number of tokens decoded so far.
    `support` asks for the top-N ids and log-probabilities of every step (0: none).
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    first_step: int = 0
    support: int = 0


@dataclass(frozen=True)
class Multiplex:
    """Multiplex Thinking: each input is the mean embedding of `width` draws until the text turns certain.

    After `patience` steps in a row with an entropy below `entropy` nats, decoding goes on with ordinary sampling.
    """

    width: int = 3
    temperature: float = 1.0
    weighted: bool = True
    entropy: float = 0.1
    patience: int = 256


@dataclass(frozen=True)
class Selection:
    """Settings of the S2T-Local loop: when it triggers, what it proposes, how it chooses (Eqs. 4, 5 and 9).

    `threshold` is on the trigger head's logit; the chosen candidate maximises score / temperature +
    prior_weight * log p_SLM(c). `method` is "top_k" or "multinomial" (K draws without replacement at T = 1);
    `ratio` keeps only candidates at least that likely relative to the top one (dynamic candidate sets, Table A4).
    """

    threshold: float
    k: int = 8
    method: Literal["top_k", "multinomial"] = "multinomial"
    ratio: float = 0.0
    prior_weight: float = 0.0
    temperature: float = 0.1
    warmup: int = 0


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
    """What happened at one triggered step: `value` is the trigger's, `scores_K` the scorer's (teacher
    probabilities or reserved-row scores), `argmax` the teacher's own choice where a teacher was asked."""

    step: int
    value: float
    candidates_K: list[int]
    logprobs_K: list[float]
    scores_K: list[float]
    chosen: int
    argmax: int | None = None


@dataclass
class Draft:
    """Generated tokens. With finish "end" the last id is the end-of-text token.

    Where `support` was asked, `top_ids_TN` and `top_logprobs_TN` hold the most probable tokens of every step, best first,
    and `entropy_T` the entropy of the whole distribution in nats; else they are None and empty."""

    ids: list[int]
    finish: Finish
    usage: Usage
    entropy_T: np.ndarray
    top_ids_TN: np.ndarray | None = None
    top_logprobs_TN: np.ndarray | None = None
    decisions: list[Decision] = field(default_factory=list)


@dataclass
class Scores:
    """`logprobs_TN` of the ids asked for and `argmax_T` over the whole vocabulary, one row a position."""

    logprobs_TN: np.ndarray
    argmax_T: np.ndarray
    usage: Usage


@dataclass(frozen=True)
class ModelCard:
    """Who an engine is, as recorded with every result. Hashes are sha256 of the weight and tokenizer files."""

    name: str
    weights: str
    tokenizer: str
    vocabulary: int
    context: int
    end_ids: tuple[int, ...]
    reserved_ids: tuple[int, ...] = ()
    has_selector: bool = False


class ContextOverflow(ValueError):
    """The prefix and what is to be generated do not fit the model's context."""


@runtime_checkable
class Engine(Protocol):
    """A model that can be called from many coroutines at once. Raises `ContextOverflow` where a call does not fit."""

    async def card(self) -> ModelCard: ...

    async def generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        """Decode from `prefix` until the end token or `max_tokens`."""
        ...

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> Scores:
        """Row t: log p(ids_TN[t] | tokens[:start + t]), from one forward over the tokens not yet cached.

        `start >= 1` and `start + T - 1 <= len(tokens)`: the last row may lie one past the last token."""
        ...

    async def select(self, prefix: list[int], candidates_K: list[int]) -> np.ndarray:
        """Logits of the reserved rows after each candidate, [K, R] (Eq. 5's z(s_t + c)[R])."""
        ...

    async def generate_selecting(self, prefix: list[int], sampling: Sampling, selection: Selection) -> Draft:
        """The S2T-Local loop. It runs inside the engine because there the scoring pass is the next decode step."""
        ...

    async def generate_multiplex(self, prefix: list[int], sampling: Sampling, multiplex: Multiplex) -> Draft:
        """Multiplex Thinking, where the engine can take mean embeddings as inputs."""
        ...

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        """Router inputs for the steps whose tokens are tokens[start:]: [T, H + H + support] float32, the last hidden
        state, the embedding of the SLM's token and its top logits (R2R)."""
        ...
