"""The selector: a LoRA on the SLM and R reserved output rows whose logits after a candidate give its score (Eq. 5).

Only the LoRA factors and the R rows are parameters. The rows are kept beside the model while it is trained and take the
place of the output embedding's reserved rows when it is merged; reserved ids are never inputs, so with tied embeddings
nothing else changes. Works on any transformers causal language model whose linears peft can adapt; knows nothing of how
batches are made or what the loss is.

Axes: _R bin (reserved row), _V vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from s2t_models.recipe import Lora
from s2t_models.reserved import bins

#: The name of the reserved rows among the selector's parameters.
ROWS = "rows_RH"


def score(logits_R: torch.Tensor, bins_R: torch.Tensor) -> torch.Tensor:
    """The preference score v . softmax(z[R]) in [0, 1], over the last axis (Eq. 5): [..., R] -> [...]."""
    return logits_R.float().softmax(-1) @ bins_R


class Selector(nn.Module):
    """A causal language model with a LoRA on it and its reserved rows as parameters. `forward` is the model's
    decoder, so a distributed wrapper around this module sees every parameter it has to keep in step."""

    bins_R: torch.Tensor

    def __init__(self, model: PreTrainedModel, reserved_ids: Sequence[int], lora: Lora) -> None:
        super().__init__()
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number scales
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
        )
        output_VH = model.get_output_embeddings().weight
        self.reserved_ids = tuple(reserved_ids)
        self.rows_RH = nn.Parameter(output_VH[list(reserved_ids)].detach().float().clone())
        self.register_buffer("bins_R", bins(len(reserved_ids)).to(output_VH.device), persistent=False)
        self.adapted = get_peft_model(model, config)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, adapters and all."""
        return cast(PreTrainedModel, self.adapted.base_model.model)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The tuned model's hidden states after the last norm, [..., H]; takes the decoder's arguments."""
        return self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Within it, `forward` is the frozen base model's, without gradients or dropout."""
        training = self.training
        trained = [(value, value.requires_grad) for value in self.parameters()]
        self.eval()
        try:
            with torch.no_grad(), self.adapted.disable_adapter():
                yield
        finally:
            self.train(training)
            for value, is_trained in trained:  # peft turns the gradients of every factor on again
                value.requires_grad_(is_trained)

    def scores(self, leaves_H: torch.Tensor) -> torch.Tensor:
        """Scores from the leaves' hidden states, [..., H] -> [...]. Only the reserved rows of the output head are
        computed."""
        return score(F.linear(leaves_H.float(), self.rows_RH), self.bins_R)

    def text_logits(self, states_H: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary without the reserved rows, [..., H] -> [..., V - R], in order of id."""
        output_VH = self.model.get_output_embeddings().weight
        first, last = self.reserved_ids[0], self.reserved_ids[-1] + 1
        logits = F.linear(states_H, output_VH[:first]).float()
        if last == len(output_VH):
            return logits
        return torch.cat((logits, F.linear(states_H, output_VH[last:]).float()), dim=-1)

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes (the parameters with gradients), by name, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.named_parameters() if value.requires_grad}

    def load_trained(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `trained` gave. Raises KeyError where a tensor is missing."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.requires_grad:
                    value.copy_(tensors[name])

    def merge(self) -> PreTrainedModel:
        """Fold LoRA and rows into a plain transformers model, which is returned; the selector is used up."""
        model = cast(PreTrainedModel, self.adapted.merge_and_unload())
        with torch.no_grad():
            output_VH = model.get_output_embeddings().weight
            output_VH[list(self.reserved_ids)] = self.rows_RH.to(output_VH.dtype)
        return model
