"""R2R's router: from the SLM's outputs at a step, the probability that its token makes the text diverge.

Inputs are an engine's `features`: last hidden state, embedding of the SLM's token, top logits. It is trained
by `training.router` and knows nothing of engines. Think-at-Hard's decider is the same network on other hidden states
(`second_pass`). Axes: _T step, _F feature, _H hidden.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch import nn

from s2t_models.storage import Location

SETTINGS, WEIGHTS = "router.json", "router.safetensors"


def weights_hash(folder: Location) -> str:
    """sha256 of the weights of the router in `folder`."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


@dataclass(frozen=True)
class RouterConfig:
    """Sizes and threshold. `hidden` is the SLM's; the inputs begin with `states` vectors of that size. The published
    router is 1024 wide with 6 blocks of expansion 4."""

    hidden: int
    support: int = 100
    width: int = 1024
    blocks: int = 6
    expansion: int = 4
    dropout: float = 0.1
    threshold: float = 0.5
    states: int = 2


class _Block(nn.Module):
    """A pre-norm residual GELU block."""

    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + self.dropout(self.down(F.gelu(self.up(self.norm(states)))))


class Router(nn.Module):
    """concat[hidden states, linear(top logits)] -> width -> residual blocks -> logit. R2R's router has two states: the
    last hidden one and the token's embedding."""

    def __init__(self, settings: RouterConfig) -> None:
        super().__init__()
        self.settings = settings
        self.logits = nn.Linear(settings.support, settings.hidden)
        self.enter = nn.Linear((settings.states + 1) * settings.hidden, settings.width)
        self.blocks = nn.Sequential(
            *(_Block(settings.width, settings.expansion, settings.dropout) for _ in range(settings.blocks))
        )
        self.norm = nn.LayerNorm(settings.width)
        self.leave = nn.Linear(settings.width, 1)

    def forward(self, inputs_TF: torch.Tensor) -> torch.Tensor:
        """Logits [T] of inputs [T, states * H + support]."""
        states = self.settings.states * self.settings.hidden
        states_TF, top_TN = inputs_TF.split((states, self.settings.support), dim=-1)
        joined = torch.cat((states_TF, self.logits(top_TN)), dim=-1)
        return self.leave(self.norm(self.blocks(self.enter(joined)))).squeeze(-1)

    @torch.no_grad()
    def probabilities(self, inputs_TF: torch.Tensor | np.ndarray) -> np.ndarray:
        """p(divergent) per step, [T] float32, computed on the router's own device."""
        inputs_TF = torch.as_tensor(inputs_TF, dtype=torch.float32, device=self.leave.weight.device)
        return self.eval()(inputs_TF).sigmoid().cpu().numpy()


def save_router(router: Router, folder: Path) -> None:
    """Write weights and settings into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(router.state_dict(), folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(asdict(router.settings), indent=2) + "\n")


def read_settings(folder: Location) -> RouterConfig:
    """Sizes and threshold of a saved router. Raises FileNotFoundError with one line where there is no router."""
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder}: holds no router; train one with the distil pipeline")
    return RouterConfig(**json.loads((folder / SETTINGS).read_text()))


def load_router(folder: Location) -> Router:
    """Read what `save_router` wrote. Raises FileNotFoundError with one line where there is no router."""
    router = Router(read_settings(folder))
    router.load_state_dict(load((folder / WEIGHTS).read_bytes()))
    return router.eval()
