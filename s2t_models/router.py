"""R2R's router: from the SLM's outputs at a step, the probability that its token makes the text diverge.

Inputs are an engine's `features`: last hidden state, embedding of the SLM's token, top logits. It knows nothing of engines
or of how the labels came about (see `policies.r2r_labels`). Axes: _T step, _F feature, _H hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

SETTINGS, WEIGHTS = "router.json", "router.safetensors"


@dataclass(frozen=True)
class RouterSettings:
    """Sizes and threshold. `hidden` is the SLM's; the published router is 1024 wide with 6 blocks of expansion 4."""

    hidden: int
    support: int = 100
    width: int = 1024
    blocks: int = 6
    expansion: int = 4
    dropout: float = 0.1
    threshold: float = 0.5


@dataclass(frozen=True)
class RouterTraining:
    """R2R's settings. `recall` is what the threshold must reach on the validation steps at the lowest positive rate."""

    learning_rate: float = 5e-5
    weight_decay: float = 5e-4
    batch: int = 1024
    epochs: int = 50
    patience: int = 10
    validation: float = 0.1
    recall: float = 0.95
    seed: int = 42


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
    """concat[last hidden, token embedding, linear(top logits)] -> width -> residual blocks -> logit."""

    def __init__(self, settings: RouterSettings) -> None:
        super().__init__()
        self.settings = settings
        self.logits = nn.Linear(settings.support, settings.hidden)
        self.enter = nn.Linear(3 * settings.hidden, settings.width)
        self.blocks = nn.Sequential(
            *(_Block(settings.width, settings.expansion, settings.dropout) for _ in range(settings.blocks))
        )
        self.norm = nn.LayerNorm(settings.width)
        self.leave = nn.Linear(settings.width, 1)

    def forward(self, inputs_TF: torch.Tensor) -> torch.Tensor:
        """Logits [T] of inputs [T, H + H + support]."""
        states_TH, top_TN = inputs_TF.split((2 * self.settings.hidden, self.settings.support), dim=-1)
        joined = torch.cat((states_TH, self.logits(top_TN)), dim=-1)
        return self.leave(self.norm(self.blocks(self.enter(joined)))).squeeze(-1)

    @torch.no_grad()
    def probabilities(self, inputs_TF: torch.Tensor | np.ndarray) -> np.ndarray:
        """p(divergent) per step, [T] float32, computed on the router's own device."""
        inputs_TF = torch.as_tensor(inputs_TF, dtype=torch.float32, device=self.leave.weight.device)
        return self.eval()(inputs_TF).sigmoid().cpu().numpy()


def recall_threshold(probabilities_T: np.ndarray, labels_T: np.ndarray, recall: float) -> float:
    """The highest threshold, that is the lowest positive rate, at which `p >= threshold` still finds `recall` of the
    positives. Raises ValueError where there are none."""
    positives = np.sort(probabilities_T[labels_T.astype(bool)])
    if not len(positives):
        raise ValueError("router: the validation steps hold no divergent step; label more prompts")
    return float(positives[int(np.floor((1 - recall) * len(positives) + 1e-9))])


def train_router(
    inputs_TF: np.ndarray,
    labels_T: np.ndarray,
    settings: RouterSettings,
    training: RouterTraining,
    report: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Router:
    """Train on steps [T, F] with 0/1 labels [T]; returns the router of the epoch with the lowest validation loss, its
    threshold set. Raises ValueError where the steps lack one of the two labels."""
    generator = torch.Generator().manual_seed(training.seed)
    order = torch.randperm(len(labels_T), generator=generator)
    held = max(1, int(len(order) * training.validation))
    inputs, labels = torch.from_numpy(inputs_TF).float(), torch.from_numpy(labels_T).float()
    valid, train = order[:held], order[held:]
    positives = float(labels[train].sum())
    if not 0 < positives < len(train):
        raise ValueError(f"router: {positives:.0f} of {len(train)} training steps are divergent; both kinds are needed")
    weight = torch.tensor((len(train) - positives) / positives)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        router = Router(settings)
        optimizer = torch.optim.AdamW(
            router.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        best, kept, waited = float("inf"), copy.deepcopy(router.state_dict()), 0
        for epoch in range(training.epochs):
            router.train()
            for batch in train[torch.randperm(len(train), generator=generator)].split(training.batch):
                loss = F.binary_cross_entropy_with_logits(router(inputs[batch]), labels[batch], pos_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            router.eval()
            with torch.no_grad():
                held_loss = F.binary_cross_entropy_with_logits(
                    router(inputs[valid]), labels[valid], pos_weight=weight
                ).item()
            report({"epoch": epoch, "train_loss": loss.item(), "validation_loss": held_loss})
            waited += 1
            if held_loss < best:
                best, kept, waited = held_loss, copy.deepcopy(router.state_dict()), 0
            if waited >= training.patience:
                break
    router.load_state_dict(kept)
    threshold = recall_threshold(
        router.probabilities(inputs_TF[valid.numpy()]), labels_T[valid.numpy()], training.recall
    )
    router.settings = replace(settings, threshold=threshold)
    return router.eval()


def save_router(router: Router, folder: Path) -> None:
    """Write weights and settings into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(router.state_dict(), folder / WEIGHTS)
    (folder / SETTINGS).write_text(json.dumps(asdict(router.settings), indent=2) + "\n")


def read_settings(folder: Path) -> RouterSettings:
    """Sizes and threshold of a saved router. Raises FileNotFoundError with one line where there is no router."""
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder}: holds no router; train one with the distil pipeline")
    return RouterSettings(**json.loads((folder / SETTINGS).read_text()))


def load_router(folder: Path) -> Router:
    """Read what `save_router` wrote. Raises FileNotFoundError with one line where there is no router."""
    router = Router(read_settings(folder))
    router.load_state_dict(load_file(folder / WEIGHTS))
    return router.eval()
