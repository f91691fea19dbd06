"""Losses over the vocabulary, a few decoding states at a time.

The logits of a whole batch over 150,000 tokens are gigabytes. Here a function of each state's hidden state alone is
computed for as many states as `LOGITS` allows, and its gradient at once, so that no logits are kept for the backward
pass and none are computed twice.

Axes: _S decoding state, _V vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

#: Logits that are there at one time: 2**25 are 128 MiB in float32, and a loss holds a few times that.
LOGITS = 2**25


def per_state(
    function: Callable[..., torch.Tensor], vocabulary: int, hidden_SH: torch.Tensor, *given: torch.Tensor
) -> torch.Tensor:
    """`function(hidden, *given)` of the states' rows, [S, ...]; `given` has a row a state too, and gets no gradient.

    A gradient flows back to `hidden_SH` where it is wanted; the function must then give one number a state, [S]."""
    if torch.is_grad_enabled() and hidden_SH.requires_grad:
        return _PerState.apply(function, vocabulary, hidden_SH, *given)  # type: ignore[no-any-return]
    parts = [function(hidden_SH[rows], *(of_S[rows] for of_S in given)) for rows in _chunks(len(hidden_SH), vocabulary)]
    return torch.cat(parts)


class _PerState(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, function: Callable[..., torch.Tensor], vocabulary: int, hidden_SH: torch.Tensor, *given: torch.Tensor
    ) -> torch.Tensor:
        values, slopes = [], []
        for rows in _chunks(len(hidden_SH), vocabulary):
            part = hidden_SH[rows].detach().requires_grad_()
            with torch.enable_grad():
                value = function(part, *(of_S[rows] for of_S in given))
                slopes.append(torch.autograd.grad(value.sum(), part)[0])  # a state's value depends on its own row alone
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(slopes))
        ctx.given = len(given)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad_S: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (slope_SH,) = ctx.saved_tensors
        return None, None, (grad_S[:, None] * slope_SH).to(slope_SH.dtype), *[None] * ctx.given


def _chunks(states: int, vocabulary: int) -> Iterator[slice]:
    """At least one, also of no states: a function of nothing still has a type and device."""
    size = max(LOGITS // vocabulary, 1)
    yield from (slice(start, start + size) for start in range(0, max(states, 1), size))
