"""From logits to tokens, for a batch of rows at once. All noise comes in as uniforms, none is drawn here.

Axes: _B row, _V vocabulary, _N support.
"""

from __future__ import annotations

import torch

#: A row whose top-k is at most this is not sorted whole.
FEW = 64


def pick(
    logits_BV: torch.Tensor,
    temperature_B: list[float],
    top_p_B: list[float],
    top_k_B: list[int],
    min_p_B: list[float],
    uniform_B: list[float],
) -> list[int]:
    """One token a row by inverse transform sampling: temperature, then top-k, top-p and min-p, in the order of
    transformers' warpers; temperature 0 is greedy. A row's token depends on that row alone."""
    picked_B = logits_BV.argmax(-1)
    sampled = [i for i, temperature in enumerate(temperature_B) if temperature > 0]
    few = [i for i in sampled if 0 < top_k_B[i] <= FEW]
    many = [i for i in sampled if not 0 < top_k_B[i] <= FEW]
    for rows in (few, many):
        if rows:
            columns = ([values[i] for i in rows] for values in (temperature_B, top_p_B, top_k_B, min_p_B, uniform_B))
            temperature_B1, top_p_B1, top_k_B1, min_p_B1, uniform_B1 = (
                torch.tensor(column, device=logits_BV.device, dtype=torch.float64)[:, None] for column in columns
            )
            # Sorted, so that the token does not hang on the order of the vocabulary.
            if rows is few:
                sorted_BN, order_BN = logits_BV[rows].topk(min(FEW, logits_BV.shape[-1]), dim=-1)
            else:
                sorted_BN, order_BN = logits_BV[rows].sort(stable=True, dim=-1, descending=True)
            # Double, so that it does not hang on the rounding of a long sum; from the best one down, so that no
            # temperature is too small to divide by.
            below_best_BN = sorted_BN.double() - sorted_BN[:, :1].double()
            rank_B1 = _draw(below_best_BN / temperature_B1, top_p_B1, top_k_B1, min_p_B1, uniform_B1)
            picked_B[rows] = order_BN.gather(-1, rank_B1)[:, 0]
    return picked_B.tolist()


def _draw(
    sorted_BN: torch.Tensor,
    top_p_B1: torch.Tensor,
    top_k_B1: torch.Tensor,
    min_p_B1: torch.Tensor,
    uniform_B1: torch.Tensor,
) -> torch.Tensor:
    """The rank drawn from logits in descending order, [B, 1]."""
    rank_N = torch.arange(sorted_BN.shape[-1], device=sorted_BN.device)
    sorted_BN = sorted_BN.masked_fill((rank_N >= top_k_B1) & (top_k_B1 > 0), -torch.inf)
    probability_BN = sorted_BN.softmax(-1)
    before_BN = probability_BN.cumsum(-1) - probability_BN
    probability_BN = probability_BN.masked_fill((before_BN >= top_p_B1) & (rank_N > 0), 0.0)
    probability_BN = probability_BN.masked_fill(probability_BN < min_p_B1 * probability_BN[:, :1], 0.0)
    cumulative_BN = probability_BN.cumsum(-1)
    rank_B1 = torch.searchsorted(cumulative_BN, uniform_B1 * cumulative_BN[:, -1:], right=True)
    return rank_B1.minimum((probability_BN > 0).sum(-1, keepdim=True) - 1)


def top(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` most probable ids and their log-probabilities, best first, [B, N] each."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    top_BN, ids_BN = logprobs_BV.topk(min(count, logits_BV.shape[-1]), dim=-1)
    return ids_BN, top_BN


def support(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The `count` most probable ids [B, N], their log-probabilities [B, N] and the whole distribution's entropy in
    nats [B]."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    top_BN, ids_BN = logprobs_BV.topk(min(count, logits_BV.shape[-1]), dim=-1)
    # A masked row has log-probability -inf and probability 0, whose product must count as 0.
    entropy_B = -(logprobs_BV.exp() * logprobs_BV.clamp_min(-1e4)).sum(-1)
    return ids_BN, top_BN, entropy_B
