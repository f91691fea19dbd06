"""From logits to tokens, for a batch of rows at once. All noise comes in as uniforms, none is drawn here.

Axes: _B row, _V vocabulary, _N support.
"""

from __future__ import annotations

import torch

#: Tokens that are sorted of a row; all of them only where the drawn one is not among these.
HEAD = 512


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
    rows = [i for i, temperature in enumerate(temperature_B) if temperature > 0]
    for count in (HEAD, logits_BV.shape[-1]):
        if rows:
            columns = ([values[i] for i in rows] for values in (temperature_B, top_p_B, top_k_B, min_p_B, uniform_B))
            given = (torch.tensor(column, device=logits_BV.device, dtype=torch.float64)[:, None] for column in columns)
            drawn_B, is_certain_B = _draw(logits_BV[rows], count, *given)
            picked_B[rows] = drawn_B
            rows = [i for i, is_certain in zip(rows, is_certain_B.tolist(), strict=True) if not is_certain]
    return picked_B.tolist()


def _draw(
    logits_BV: torch.Tensor,
    count: int,
    temperature_B1: torch.Tensor,
    top_p_B1: torch.Tensor,
    top_k_B1: torch.Tensor,
    min_p_B1: torch.Tensor,
    uniform_B1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token drawn from the `count` best of each row, [B], and whether all of them sorted would give the same, [B].

    Sorted, so that the token does not hang on the order of the vocabulary; in double, so that it does not hang on the
    rounding of a long sum; from the best one down, so that no temperature is too small to divide by."""
    sorted_BN, order_BN = _best(logits_BV, count)
    best_B1 = sorted_BN[:, :1].double()
    weight_BN = ((sorted_BN.double() - best_B1) / temperature_B1).exp()
    is_all = weight_BN.shape[-1] == logits_BV.shape[-1]
    rank_N = torch.arange(weight_BN.shape[-1], device=weight_BN.device)
    is_cut_BN = (rank_N >= top_k_B1) & (top_k_B1 > 0)
    weight_BN.masked_fill_(is_cut_BN, 0.0)
    mass_B1 = weight_BN.sum(-1, keepdim=True)
    if not is_all and not is_cut_BN[:, -1].all():
        whole_B1 = logits_BV.double().sub_(best_B1).div_(temperature_B1).exp_().sum(-1, keepdim=True)
        mass_B1 = torch.where(is_cut_BN[:, -1:], mass_B1, whole_B1)
    probability_BN = weight_BN / mass_B1
    before_BN = probability_BN.cumsum(-1) - probability_BN
    probability_BN = probability_BN.masked_fill((before_BN >= top_p_B1) & (rank_N > 0), 0.0)
    probability_BN = probability_BN.masked_fill(probability_BN < min_p_B1 * probability_BN[:, :1], 0.0)
    cumulative_BN = probability_BN.cumsum(-1)
    # What is left of a row ends here, or goes on behind the last that is sorted.
    ends_B1 = (probability_BN[:, -1:] == 0.0) | is_all
    goes_on_B1 = ~ends_B1 & (top_p_B1 >= 1.0) & (min_p_B1 == 0.0) & (top_k_B1 == 0)
    left_B1 = torch.where(ends_B1, cumulative_BN[:, -1:], 1.0)
    rank_B1 = torch.searchsorted(cumulative_BN, uniform_B1 * left_B1, right=True)
    is_inside_B1 = ends_B1 | (goes_on_B1 & (rank_B1 < len(rank_N)))
    rank_B1 = rank_B1.minimum((probability_BN > 0).sum(-1, keepdim=True) - 1)
    # Of tokens as likely as the last one, others may be behind it.
    is_apart_B1 = (sorted_BN.gather(-1, rank_B1) > sorted_BN[:, -1:]) | is_all
    return order_BN.gather(-1, rank_B1)[:, 0], (is_inside_B1 & is_apart_B1)[:, 0]


def _best(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` highest logits of each row and their ids, [B, N] each: highest first, equal ones in order of id."""
    if count >= logits_BV.shape[-1]:
        return logits_BV.sort(stable=True, dim=-1, descending=True)
    ids_BN = logits_BV.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    sorted_BN, order_BN = logits_BV.gather(-1, ids_BN).sort(stable=True, dim=-1, descending=True)
    return sorted_BN, ids_BN.gather(-1, order_BN)


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
