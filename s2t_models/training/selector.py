"""The selector: a LoRA on the SLM and R output rows whose logits after a candidate give its score (Eq. 5).

Only the LoRA factors and the R rows are parameters. The rows are kept beside the model while it is trained and take the
place of the output embedding's reserved rows when it is merged; reserved ids are never inputs, so with tied embeddings
nothing else changes. A model without reserved rows keeps them beside it for good: an auxiliary ranking head (D.1).
Works on any transformers causal language model whose linears peft can adapt; knows nothing of how batches are made or
what the loss is.

Axes: _R bin (reserved row), _V vocabulary, _H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from s2t_models.artifact import Adapter
from s2t_models.loading import load_config
from s2t_models.output_head import OutputHead
from s2t_models.recipe import RecipeError
from s2t_models.reserved import bins
from s2t_models.second_pass import Gate
from s2t_models.settings import ModelSettings
from s2t_models.training.tree_attention import decode, use_tree_attention
from s2t_models.training_settings import LoraSettings

#: The name of the reserved rows among the selector's parameters.
ROWS = "rows_RH"
#: The logit of what is never generated: finite, so that a difference of two of them is no nan.
NEVER = torch.finfo(torch.float32).min / 2


def score(logits_R: torch.Tensor, bins_R: torch.Tensor) -> torch.Tensor:
    """The preference score v . softmax(z[R]) in [0, 1], over the last axis (Eq. 5): [..., R] -> [...]."""
    return logits_R.float().softmax(-1) @ bins_R


def lora_targets(model: PreTrainedModel, lora: LoraSettings) -> list[str]:
    """The ends of the names of the linear layers that get a LoRA: those listed, or all but the output embedding.

    Raises RecipeError where one that is listed is the end of no linear layer's name."""
    output = model.get_output_embeddings()
    linear = (nn.Linear, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, linear) and module is not output]
    missing = [target for target in lora.targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    ends = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    if missing:
        raise RecipeError(
            f"distil.lora.targets: {model.config.model_type} has no linear layers called {', '.join(missing)}; "
            f"it has {', '.join(ends)}; list none to take them all"
        )
    return list(lora.targets) or ends


def lora_config(model: PreTrainedModel, lora: LoraSettings) -> LoraConfig:
    """peft's own configuration of a LoRA on the model. Raises RecipeError as `lora_targets` does."""
    targets = lora_targets(model, lora)
    adapted = (module for name, module in model.named_modules() if f".{name}".endswith(tuple(f".{t}" for t in targets)))
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number scales
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in adapted),  # how GPT-2 lays its weights out
    )


def check_targets(settings: ModelSettings, lora: LoraSettings) -> None:
    """Raise RecipeError as `lora_targets` does, from the model's configuration alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(settings))
    lora_targets(model, lora)


class Selector(nn.Module):
    """A causal language model with a LoRA on it and the R rows that score as parameters: those of `reserved_ids`, or,
    where there are none, `count` new ones. `forward` is the model's decoder, so a distributed wrapper around this
    module sees every parameter it has to keep in step."""

    bins_R: torch.Tensor
    reserved_N: torch.Tensor

    def __init__(
        self, model: PreTrainedModel, reserved_ids: Sequence[int], lora: LoraSettings, count: int = 16
    ) -> None:
        super().__init__()
        config = lora_config(model, lora)
        output_VH = model.get_output_embeddings().weight
        self.reserved_ids = tuple(reserved_ids)
        rows_RH = output_VH[list(reserved_ids)].detach().float().clone()
        if not reserved_ids:  # as large as the other rows, so that scores begin as they do on reserved ones
            rows_RH = torch.randn(count, output_VH.shape[1], device=output_VH.device) * output_VH.float().std()
        self.rows_RH = nn.Parameter(rows_RH)
        self.register_buffer("bins_R", bins(len(rows_RH)).to(output_VH.device), persistent=False)
        reserved = torch.tensor(reserved_ids, dtype=torch.long, device=output_VH.device)
        self.register_buffer("reserved_N", reserved, persistent=False)
        self._attention = model.config._attn_implementation
        use_tree_attention(model)
        self.adapted = get_peft_model(model, config)
        for module in self.adapted.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = model.dtype == torch.float32  # type: ignore[assignment]  # see `forward`
        self.output = OutputHead(self.model)
        self.gate = Gate(self.adapted)

    @property
    def ranking_head(self) -> torch.Tensor | None:
        """The auxiliary head's weight, [R, H]; None where reserved rows do its work."""
        return None if self.reserved_ids else self.rows_RH.detach()

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model inside, adapters and all."""
        return cast(PreTrainedModel, self.adapted.base_model.model)

    def forward(self, lora_BL: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
        """The tuned model's hidden states after the last norm, [B, L, H]; takes the arguments of
        `tree_attention.decode`. With `lora_BL` (bool) the LoRA acts on these tokens alone.

        In half precision the LoRA factors, which are float32, are computed with in the model's: casting their inputs up
        would keep a second copy of nearly every activation."""
        self.gate.open_BL = lora_BL
        device, dtype = self.rows_RH.device.type, self.model.dtype
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return decode(self.model, **inputs)

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
        """Scores from the leaves' hidden states, [..., H] -> [...]. Only the R rows are computed: reserved ones through
        the model class's output head, with its scale and cap, the auxiliary head's as they are."""
        if not self.reserved_ids:
            return score(nn.functional.linear(leaves_H.float(), self.rows_RH), self.bins_R)
        bias_V = self._bias_V
        bias_R = None if bias_V is None else bias_V[list(self.reserved_ids)].float()
        return score(self.output.rows(leaves_H.float(), self.rows_RH, bias_R), self.bins_R)

    def text_logits(self, states_H: torch.Tensor) -> torch.Tensor:
        """Logits over the vocabulary, [..., H] -> [..., V]; those of the reserved rows, which no text has, are so low
        that they never count."""
        logits_V = self.output(states_H).float()
        return logits_V.index_fill(-1, self.reserved_N, NEVER)

    @property
    def vocabulary(self) -> int:
        return len(self.model.get_output_embeddings().weight)

    @property
    def _bias_V(self) -> torch.Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)

    def trained(self) -> dict[str, torch.Tensor]:
        """What training changes (the parameters with gradients), by name, on the CPU."""
        return {name: value.detach().cpu() for name, value in self.named_parameters() if value.requires_grad}

    def load_trained(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take up what `trained` gave. Raises KeyError where a tensor is missing."""
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.requires_grad:
                    value.copy_(tensors[name])

    def adapter(self, base: str) -> Adapter:
        """The LoRA as plain peft loads it on the model called `base`; the R rows are not part of it."""
        config = self.adapted.peft_config["default"]
        config.base_model_name_or_path, config.inference_mode = base, True
        tensors = {
            name: value.cpu()
            for name, value in get_peft_model_state_dict(self.adapted, save_embedding_layers=False).items()
        }
        return Adapter(config.to_dict(), tensors)

    def base(self) -> PreTrainedModel:
        """The frozen base as the plain transformers model that it was; the selector is used up."""
        model = cast(PreTrainedModel, self.adapted.unload())
        model.set_attn_implementation(self._attention)
        return model

    def merge(self) -> PreTrainedModel:
        """Fold LoRA and reserved rows into a plain transformers model, which is returned; the selector is used up."""
        model = cast(PreTrainedModel, self.adapted.merge_and_unload())
        model.set_attn_implementation(self._attention)
        with torch.no_grad():
            output_VH = model.get_output_embeddings().weight
            if self.reserved_ids:
                output_VH[list(self.reserved_ids)] = self.rows_RH.to(output_VH.dtype)
        return model
