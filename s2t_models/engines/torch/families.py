"""Which model families the torch engine serves: those whose log-probabilities it gives exactly.

Most of transformers' decoder-only classes run on the engine's cache unchanged; what does not is refused by name when it
is loaded. What a configuration tells is read from it. For the rest, a few tokens go through the engine's cache, beside
a neighbour at the end of the context, and are compared with the model's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2t_models.engines.torch.attention import UnsupportedAttention
from s2t_models.engines.torch.slots import Query, Slots
from s2t_models.errors import UserError, one_line
from s2t_models.output_head import OutputHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Tokens of the comparison.
TOKENS = 12
#: The mean difference of log-probabilities that rounding explains, for a distribution whose log-probabilities spread by
#: one nat. Half precision rounds logits of 16 to an eighth; a forgotten scale or cap is off by more than the spread.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class UnsupportedModel(UserError):
    """A model that the torch engine does not serve, or not with this context; the message is one line."""


def default_context(model: PreTrainedModel) -> int:
    """The context where the recipe sets none: what the model allows, 4096 at most."""
    longest = getattr(model.config, "max_position_embeddings", None) or 4096
    return min(longest, unchanging_context(model) or longest, 4096)


def unchanging_context(model: PreTrainedModel) -> int | None:
    """Up to how many tokens a row's positions are encoded alike whatever else is in the batch. None: always.

    "longrope" and "dynamic" rotary embeddings change their frequencies once the longest row of a batch passes the
    length that they were first trained for."""
    lengths = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in types.items() if isinstance(types, dict) else [(None, types)]:
            if rope_type == "longrope":
                parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
                parameters = parameters[layer_type] if layer_type else parameters
                lengths.append(int(parameters["original_max_position_embeddings"]))
            elif isinstance(rope_type, str) and "dynamic" in rope_type:
                lengths.append(int(module.original_max_seq_len))  # type: ignore[arg-type]
    return min(lengths, default=None)


def check_configuration(model: PreTrainedModel, context: int, setting: str) -> None:
    config: Any = model.config
    if config.get_text_config() is not config:
        raise _unsupported(model, "it is a multimodal model")
    if not all(getattr(config, key, None) for key in ("num_attention_heads", "num_hidden_layers", "hidden_size")):
        raise _unsupported(model, "it has no attention")
    if getattr(config, "expert_capacity", None):
        raise _unsupported(model, "its experts drop tokens according to what else is in the batch")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _unsupported(model, f"it has layers of kind {', '.join(sorted(kinds))}")
    unchanging = unchanging_context(model)
    if unchanging is not None and context > unchanging:
        raise UnsupportedModel(
            f"{setting} = {context}: beyond {unchanging} tokens the rotary embedding of {config.model_type} changes "
            f"with the longest row of the batch; set {setting} to {unchanging} or less"
        )
    is_rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    longest = getattr(config, "max_position_embeddings", None)
    if longest and context > longest and not is_rotary:
        raise UnsupportedModel(
            f"{setting} = {context}: {config.model_type} has positions for {longest} tokens; "
            f"set {setting} to {longest} or less"
        )


@torch.inference_mode()
def prepare(
    model: PreTrainedModel, count: int, context: int, setting: str, second: bool = False
) -> tuple[Slots, OutputHead]:
    """The model on `count` slots of `context` tokens, with `second` with room for second passes, and its output head.
    Raises UnsupportedModel where its log-probabilities would not be those of its own forward; `setting` is the recipe's
    key for the context."""
    check_configuration(model, context, setting)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, min(TOKENS, context)).tolist()
    with _refusing_failures(model, "its own forward fails"):
        model.set_attn_implementation("eager")
        ids = torch.tensor([tokens], device=model.device)
        own_TV = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    slots = Slots(model, count, context, second)
    with _refusing_failures(model, "its class fails on the engine's cache"):
        output = OutputHead(model)
        logprobs_TV = output(_hidden_states(slots, tokens)).float().log_softmax(-1)
    if set(slots.windows) != set(range(model.config.num_hidden_layers)):
        raise _unsupported(model, "its attention does not go through transformers' attention interface")
    if slots.windows != _windows(model):
        raise _unsupported(model, "its attention's sliding windows are not those of its configuration")
    difference, spread = float((logprobs_TV - own_TV).abs().mean()), float(own_TV.std())
    if not difference <= TOLERANCE[model.dtype] * (1 + spread):
        raise _unsupported(
            model, f"its log-probabilities on the engine's cache are {difference:.2g} nats off those of its own forward"
        )
    return slots, output


def _hidden_states(slots: Slots, tokens: list[int]) -> torch.Tensor:
    """Those of the tokens, [T, H], read in two pieces, the second beside a neighbour at the end of the context. The
    slots are empty again afterwards."""
    half = len(tokens) // 2
    try:
        first_TH, _, _ = slots.forward([Query(0, 0, tokens[:half])])
        queries = [Query(0, half, tokens[half:])]
        if len(slots.tokens) > 1:
            queries.append(Query(1, slots.length - 1, tokens[:1]))
        rest_TH, _, _ = slots.forward(queries)
    finally:
        for known in slots.tokens:
            known.clear()
    return torch.cat([first_TH, rest_TH[: len(tokens) - half]])


@contextmanager
def _refusing_failures(model: PreTrainedModel, what: str) -> Iterator[None]:
    """Turn what goes wrong in the class's own code, which may be anything, into a refusal."""
    try:
        yield
    except UnsupportedAttention as error:
        raise _unsupported(model, str(error)) from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{what} ({type(error).__name__}: {one_line(error, 200)})"
        raise _unsupported(model, reason) from error


def _windows(model: PreTrainedModel) -> dict[int, int | None]:
    """The sliding window that each layer should use."""
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{model.config.model_type} ({type(model).__name__}): the torch engine does not serve it: {reason}"
    )
