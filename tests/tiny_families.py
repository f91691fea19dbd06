"""Tiny random pairs in the shape of the families that the paper names: configuration, kinds of special tokens, chat
template, and rows that no text uses (or none of them)."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
}
WINDOW = {"head_dim": 8, "sliding_window": 16}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """`free` counts the rows that no text uses: those held in reserve by the tokenizer and the `above` it."""

    config: type[Any]
    special: tuple[str, ...]
    template: str
    end: str
    free: int
    above: int = 0
    begin: str | None = None
    more: Any = None


FAMILIES = {
    "qwen2.5": Family(
        hf.Qwen2Config, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), CHATML, "<|im_end|>", free=24, above=24
    ),
    "qwen3": Family(
        hf.Qwen3Config,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        CHATML,
        "<|im_end|>",
        free=24,
        above=24,
        more={"head_dim": 8},
    ),
    "llama3": Family(
        hf.LlamaConfig,
        (
            *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_0|>"),
            *("<|eot_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(1, 20))),
        ),
        LLAMA3,
        "<|eot_id|>",
        free=20,
        begin="<|begin_of_text|>",
    ),
    "phi3": Family(
        hf.Phi3Config,
        (
            *("<s>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|system|>", "<|end|>"),
            *("<|placeholder3|>", "<|user|>"),
        ),
        PHI3,
        "<|end|>",
        free=18,
        above=15,
        more={"pad_token_id": 0},
    ),
    "gemma2": Family(
        hf.Gemma2Config,
        ("<pad>", "<eos>", "<bos>", *(f"<unused{n}>" for n in range(20)), "<start_of_turn>", "<end_of_turn>"),
        GEMMA,
        "<end_of_turn>",
        free=20,
        begin="<bos>",
        more=WINDOW | {"final_logit_softcapping": 8.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3": Family(
        hf.Gemma3TextConfig,
        ("<pad>", "<eos>", "<bos>", *(f"<unused{n}>" for n in range(20)), "<start_of_turn>", "<end_of_turn>"),
        GEMMA,
        "<end_of_turn>",
        free=20,
        begin="<bos>",
        more=WINDOW | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mistral": Family(
        hf.MistralConfig, ("<s>", "</s>"), MISTRAL, "</s>", free=0, begin="<s>", more={"sliding_window": 16}
    ),
}


def write_pair(family: Family, folder: Path, teacher_rows: int = 0) -> dict[str, Any]:
    """`folder`/slm and `folder`/teacher as model folders with one tokenizer; returns the models, in float32. The
    teacher has `teacher_rows` vocabulary rows more."""
    tokenizer = family_tokenizer(family)
    models: dict[str, Any] = {}
    for name, more_rows, seed in (("slm", 0, 1), ("teacher", teacher_rows, 2)):
        config = family.config(
            **SIZES | (family.more or {}),
            vocab_size=len(tokenizer) + family.above + more_rows,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        models[name] = model
    return models


def family_tokenizer(family: Family) -> hf.PreTrainedTokenizerFast:
    """One token a character, behind the family's special tokens."""
    texts = [*family.special, *string.ascii_letters, *string.digits, *string.punctuation, " ", "\n"]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(texts)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.begin, eos_token=family.end, chat_template=family.template
    )
