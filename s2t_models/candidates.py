"""Candidate sets C_t: which of the SLM's tokens a scorer may choose from at a triggered step (section 4.2, Table A15).

Axes: _N the SLM's top-N support in order of probability, _K candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from s2t_models.noise import uniforms
from s2t_models.settings import CandidateSettings

Method = Literal["top_k", "multinomial"]

#: The support that candidates are drawn from: what lies outside the top 64 is not worth a candidate.
SUPPORT = 64


def candidates_at(
    ids_N: np.ndarray, logprobs_N: np.ndarray, settings: CandidateSettings, seed: int, step: int
) -> tuple[list[int], np.ndarray]:
    """The candidates of one step from its support: ids, and the SLM's log-probabilities [K], best first. The draws
    depend on (seed, step) alone."""
    noise_K = uniforms(seed, step, settings.k, "candidates") if settings.method == "multinomial" else None
    chosen_K = propose(
        logprobs_N, settings.k, settings.method, settings.ratio, noise_K, settings.temperature, settings.top_p
    )
    return [int(token) for token in np.asarray(ids_N)[chosen_K]], np.asarray(logprobs_N)[chosen_K]


def reach(settings: CandidateSettings) -> int:
    """How many of the most probable tokens `candidates_at` has to see."""
    first_k_are_all = settings.method == "top_k" and settings.ratio == 0 and settings.top_p == 1
    return settings.k if first_k_are_all else SUPPORT


def propose(
    logprobs_N: np.ndarray,
    k: int,
    method: Method,
    ratio: float = 0.0,
    uniforms_K: np.ndarray | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Indices into the support of at most `k` candidates, best first, [<=K] int.

    "top_k" takes the first k. "multinomial" draws k without replacement, one uniform of `uniforms_K` a draw. Both take
    from the support renormalised at `temperature`, of which `top_p` < 1 leaves the fewest likeliest tokens that hold
    that share (Table A15). `ratio` > 0 keeps only candidates at least `ratio` times as probable as the support's top
    one (dynamic sizing, Table A4).
    """
    logprobs_N = np.asarray(logprobs_N, dtype=np.float64)
    weights_N = np.exp((logprobs_N - logprobs_N.max()) / temperature)
    k = min(k, int(np.isfinite(logprobs_N).sum()))
    if top_p < 1.0:
        cumulative_N = weights_N.cumsum()
        nucleus = int(np.searchsorted(cumulative_N, top_p * cumulative_N[-1])) + 1
        weights_N[nucleus:] = 0.0
        k = min(k, nucleus)
    if method == "top_k":
        chosen_K = np.arange(k)
    else:
        if uniforms_K is None or len(uniforms_K) < k:
            raise ValueError(f"multinomial candidates need {k} uniforms")
        chosen_K = np.sort(_draw_without_replacement(weights_N, uniforms_K[:k]))
    if ratio > 0.0:
        chosen_K = chosen_K[logprobs_N[chosen_K] >= logprobs_N[0] + np.log(ratio)]
        chosen_K = chosen_K if len(chosen_K) else np.zeros(1, dtype=int)
    return chosen_K


def _draw_without_replacement(weights_N: np.ndarray, uniforms_K: np.ndarray) -> np.ndarray:
    weights_N = weights_N.copy()
    drawn = np.empty(len(uniforms_K), dtype=int)
    for draw, u in enumerate(uniforms_K):
        cumulative_N = weights_N.cumsum()
        drawn[draw] = min(np.searchsorted(cumulative_N, u * cumulative_N[-1], side="right"), len(weights_N) - 1)
        if weights_N[drawn[draw]] == 0.0:  # u rounded up to the very end of the support
            drawn[draw] = weights_N.argmax()
        weights_N[drawn[draw]] = 0.0
    return drawn


def is_rescue(candidates_K: Sequence[int], logprobs_K: Sequence[float], chosen: int) -> bool:
    """Whether a decision chose a token that is not the SLM's own first among the candidates, by its log-probabilities;
    where there are no candidates it did not."""
    return bool(candidates_K) and chosen != candidates_K[int(np.argmax(logprobs_K))]
