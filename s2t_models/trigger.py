"""The trigger head: says from the SLM's last hidden state whether a step is a divergence point (appendix E).

It is trained (`training.trigger_head`) on the hidden states, after the last norm, of the model that will be served. Its
threshold is set afterwards, as the percentile for the wanted budget.

Axes: _M step of any trajectory, _H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class TriggerHead(nn.Module):
    """A two-layer MLP with ReLU and dropout: [..., H] -> logit [...] (E.2)."""

    def __init__(self, hidden_size: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(hidden_size, hidden)
        self.dropout = dropout
        self.second = nn.Linear(hidden, 1)

    def forward(self, hidden_MH: torch.Tensor) -> torch.Tensor:
        # Functions, not modules: at a batch of one, calling a module costs as much as what it computes, at every step.
        activations = F.linear(hidden_MH.to(self.first.weight.dtype), self.first.weight, self.first.bias).relu_()
        if self.training:
            activations = F.dropout(activations, self.dropout)
        return F.linear(activations, self.second.weight, self.second.bias).squeeze(-1)
