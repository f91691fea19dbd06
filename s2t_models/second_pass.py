"""What Think-at-Hard adds to a model: a decider that says which tokens are hard, and a LoRA for their second pass.

    second_pass.json    what the decider reads (`Card`)
    adapter/            the LoRA, for peft on the base model; it acts from the second pass on
    decider/            the decider: an MLP like R2R's router, on the first pass's hidden states and top logits
    provenance.json

The first pass is the base model's own. A hard token runs again: its input is the mean of the embeddings of the
likeliest next tokens, weighted by their probabilities; it sees the first pass up to itself and the second passes of the
hard tokens before it ("duo-causal" attention); the logits of its passes add. How an engine or a training runs the
passes is not known here.

Axes: _B row, _L token of a row, _T token, _V vocabulary, _N the likeliest next tokens, _F feature, _H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import nn

from s2t_models import router
from s2t_models.artifact import ADAPTER, ADAPTER_WEIGHTS, Adapter
from s2t_models.errors import UserError, first_problem
from s2t_models.node_cache import fetched
from s2t_models.provenance import Provenance
from s2t_models.router import Router, load_router, save_router
from s2t_models.storage import Location, location

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD, DECIDER = "second_pass.json", "decider"
#: What peft puts before the names of a model's modules.
_PEFT_PREFIX = "base_model.model."


class SecondPassError(UserError):
    """A directory that holds no second pass; the message is one line."""


class Card(BaseModel):
    """What second_pass.json holds: the `layers` whose hidden states the decider reads (0: the embeddings), and how many
    of the likeliest next tokens it reads and the second pass's input is the mean of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["tah/1"] = "tah/1"
    layers: tuple[int, ...]
    support: int


@dataclass(frozen=True)
class SecondPass:
    """A directory that was read and checked; its weights are not read yet."""

    folder: Location
    card: Card

    @classmethod
    def load(cls, folder: str | Location) -> SecondPass:
        """Raises SecondPassError, and StorageError where an object store cannot be reached."""
        folder = location(folder)
        if not (folder / CARD).is_file():
            raise SecondPassError(f"{folder}: holds no second pass; `s2t distil --objective tah` trains one")
        try:
            return cls(folder, Card.model_validate_json((folder / CARD).read_text()))
        except ValidationError as error:
            raise SecondPassError(f"{folder / CARD}: {first_problem(error)}") from None

    @property
    def weights_hash(self) -> str:
        """sha256 of the weights of adapter and decider."""
        adapter = hashlib.sha256((self.folder / ADAPTER / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
        return hashlib.sha256(f"{adapter}{router.weights_hash(self.folder / DECIDER)}".encode()).hexdigest()

    def decider(self) -> Router:
        """In eval mode, on the CPU."""
        return load_router(self.folder / DECIDER)

    def attach(self, model: PreTrainedModel) -> Gate:
        """Put the LoRA into the model; it acts where the gate, which is closed, is opened. Raises SecondPassError where
        it is another model's."""
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

        folder = fetched(self.folder) / ADAPTER
        inject_adapter_in_model(LoraConfig.from_pretrained(str(folder)), model)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        factors = {name.removeprefix(_PEFT_PREFIX): value for name, value in tensors.items()}
        try:
            loaded: Any = set_peft_model_state_dict(model, factors)
            unknown = loaded.unexpected_keys
        except RuntimeError:  # of another size
            unknown = list(factors)
        if unknown:
            raise SecondPassError(f"{self.folder}: its LoRA is another model's ({unknown[0]})")
        gate = Gate(model.eval())
        gate.open(None)
        return gate


def save(folder: Path, adapter: Adapter, decider: Router, card: Card, provenance: Provenance) -> None:
    """Write the parts into an empty `folder`."""
    adapter.write(folder / ADAPTER)
    save_router(decider, folder / DECIDER)
    provenance.write(folder)
    (folder / CARD).write_text(card.model_dump_json(indent=2) + "\n")


class Gate:
    """Lets the LoRA of a model act on some tokens of a forward alone; until it is used, on all."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        self._layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        self._enabled = True
        #: bool, the tokens of the forward that it acts on; None: all.
        self.open_BL: torch.Tensor | None = None
        for layer in self._layers:
            for up in layer.lora_B.values():
                up.register_forward_hook(self._limit)

    def open(self, open_BL: torch.Tensor | None) -> None:
        """For the forwards that follow: with None it acts on no token, and costs nothing."""
        self.open_BL = open_BL
        enabled = open_BL is not None
        if enabled != self._enabled:
            for layer in self._layers:
                layer.enable_adapters(enabled)  # type: ignore[operator]  # of peft's BaseTunerLayer
            self._enabled = enabled

    def _limit(self, module: nn.Module, inputs: Any, output_BLH: torch.Tensor) -> torch.Tensor:
        return output_BLH if self.open_BL is None else output_BLH * self.open_BL[..., None]


def mean_embedding(
    logits_TV: torch.Tensor, support: int, embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The second pass's input, [T, H]: the embeddings of each row's `support` likeliest tokens, weighted by the softmax
    over these. `embed` is the model's input embedding."""
    top_TN, ids_TN = logits_TV.topk(support, dim=-1)
    embeddings_TNH = embed(ids_TN)
    weights_TN = top_TN.float().softmax(-1).to(embeddings_TNH.dtype)
    return torch.einsum("tn,tnh->th", weights_TN, embeddings_TNH)


def decider_inputs(states_TF: torch.Tensor, logits_TV: torch.Tensor, support: int) -> torch.Tensor:
    """What the decider reads, float32: the first pass's hidden states of the card's layers, laid end to end, and its
    `support` top logits, [T, F + support]."""
    return torch.cat([states_TF.float(), logits_TV.topk(support, dim=-1).values.float()], dim=-1)
