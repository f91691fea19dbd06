"""Model families against transformers' own forward and generate: served exactly, or refused by name in one line."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers as hf

from s2t_models.engines import selector as served
from s2t_models.engines.contract import ModelCard, Sampling
from s2t_models.engines.torch import families
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.engines.torch.families import UnsupportedModel
from s2t_models.recipe import RecipeError
from s2t_models.reserved import bins
from s2t_models.training.selector import Selector, lora_config, lora_targets, score
from s2t_models.training_settings import LoraSettings

VOCABULARY, ORIGINAL = 97, 64
RESERVED = tuple(range(90, 97))
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"head_dim": 8, "sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SERVED = {
    "qwen2": hf.Qwen2Config(**SIZES),
    "qwen3": hf.Qwen3Config(**SIZES, head_dim=8),
    "llama": hf.LlamaConfig(**SIZES),
    "llama, dynamic": hf.LlamaConfig(
        **SIZES | {"max_position_embeddings": ORIGINAL},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "mistral": hf.MistralConfig(**SIZES, sliding_window=8),
    "mixtral": hf.MixtralConfig(**SIZES, **EXPERTS),
    "phi": hf.PhiConfig(**SIZES),  # its output embedding has biases
    "phi3, longrope": hf.Phi3Config(**SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL),
    "granite": hf.GraniteConfig(**SIZES, logits_scaling=0.1, embedding_multiplier=12.0, attention_multiplier=0.2),
    "cohere": hf.CohereConfig(**SIZES, logit_scale=0.25),
    "cohere2": hf.Cohere2Config(**SIZES, **HEADS, logit_scale=4.0),
    "gemma2": hf.Gemma2Config(**SIZES, **HEADS, final_logit_softcapping=3.0, attn_logit_softcapping=0.5),
    "gemma3": hf.Gemma3TextConfig(
        **SIZES, **HEADS, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": hf.GPT2Config(**GPT2),
}
REFUSED = {
    "sinks": (hf.GptOssConfig(**SIZES, **HEADS, **EXPERTS), "gpt_oss", "attention has sinks"),
    "attention of its own": (
        hf.GPTJConfig(**GPT2, rotary_dim=4),
        "gptj",
        "attention does not go through transformers' attention interface",
    ),
    "no arguments passed on": (hf.StableLmConfig(**SIZES), "stablelm", "does not pass arguments on to its attention"),
    "no attention": (hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), "mamba", "has no attention"),
    "chunks": (
        hf.Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=8, num_local_experts=2),
        "llama4_text",
        "layers of kind chunked_attention",
    ),
    "keys unlike values": (
        hf.DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4},
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=4,
            first_k_dense_replace=3,
        ),
        "deepseek_v3",
        "fails on the engine's cache",
    ),
}


def tiny(config: Any) -> Any:
    """A random model whose greedy text is not all one token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


@contextmanager
def running(model: Any, context: int = ORIGINAL, name: str = "slm", **more: Any) -> Iterator[TorchEngine]:
    card = ModelCard(name, "weights", "tokenizer", VOCABULARY, context, (2,))
    engine = TorchEngine(copy.deepcopy(model), card, slots=4, **more)
    try:
        yield engine
    finally:
        engine.close()


def run(*calls: Any) -> list[Any]:
    async def together() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run(together())


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, RESERVED[0], length).tolist() for length in (3, 17, 40)]


@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED.keys())
@torch.no_grad()
def test_a_served_family_gives_transformers_log_probabilities_and_text(config: Any) -> None:
    model, asked = tiny(config), prompts()
    everything_TN = np.tile(np.arange(VOCABULARY), (len(asked[1]) - 1, 1))
    own_TV = model(torch.tensor([asked[1]]), use_cache=False).logits[0, :-1].log_softmax(-1)
    with running(model) as engine:
        (scores,) = run(engine.score(asked[1], 1, everything_TN))
        drafts = run(*(engine.generate(prompt, Sampling(20)) for prompt in asked))
    np.testing.assert_allclose(scores.logprobs_TN, own_TV, atol=1e-4)
    for prompt, draft in zip(asked, drafts, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
        assert draft.ids == ids[0, len(prompt) :].tolist()
    assert len({tuple(draft.ids) for draft in drafts}) > 1


@pytest.mark.parametrize("name", ["granite", "cohere2", "gemma2", "phi", "qwen2"])
@torch.no_grad()
def test_reserved_rows_are_scaled_and_capped_like_all_others(name: str) -> None:
    """In the engine, and in training before and after the merge (Eq. 5's z are the model's logits)."""
    model, prefix, candidates_K = tiny(SERVED[name]), prompts()[1], [5, 17, 41]
    ids_KT = torch.tensor([[*prefix, candidate] for candidate in candidates_K])
    own_KV = model(ids_KT, use_cache=False).logits[:, -1]
    scoring = served.Selector(torch.nn.Identity(), torch.tensor(RESERVED), bins(len(RESERVED)))
    with running(model, selector=scoring) as engine:
        (selected,) = run(engine.select(prefix, candidates_K))
    own_K = score(own_KV[:, RESERVED], bins(len(RESERVED)))
    np.testing.assert_allclose(selected.scores_K, own_K, atol=1e-5)
    selector = Selector(copy.deepcopy(model), RESERVED, LoraSettings(rank=2)).eval()
    selector.rows_RH.mul_(1.5)
    hidden_KH = selector(input_ids=ids_KT)[:, -1]
    scores_K, text_KV = selector.scores(hidden_KH), selector.text_logits(hidden_KH)
    merged_KV = selector.merge()(ids_KT, use_cache=False).logits[:, -1]
    text_KV = text_KV[:, : RESERVED[0]]
    torch.testing.assert_close(text_KV, own_KV[:, : RESERVED[0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(text_KV, merged_KV[:, : RESERVED[0]], atol=1e-4, rtol=0)
    torch.testing.assert_close(scores_K, score(merged_KV[:, RESERVED], bins(len(RESERVED))), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("config", "family", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_exactly_is_refused_by_name(config: Any, family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel) as refused, running(tiny(config)):
        pass
    message = str(refused.value)
    assert message.startswith(f"{family} (")
    assert reason in message
    assert "\n" not in message


def test_log_probabilities_that_are_not_the_models_own_are_refused() -> None:
    """Here because what follows the decoder is taken to be the output embedding alone."""
    model = tiny(SERVED["qwen2"])
    with patch.object(families, "OutputHead", lambda model: model.get_output_embeddings()), running(model):
        pass  # nothing but the embedding follows this class's decoder
    model = tiny(SERVED["granite"])
    with (
        patch.object(families, "OutputHead", lambda model: model.get_output_embeddings()),
        pytest.raises(UnsupportedModel, match=r"granite .* nats off those of its own forward"),
        running(model),
    ):
        pass


@pytest.mark.parametrize("name", ["phi3, longrope", "llama, dynamic"])
def test_a_row_does_not_depend_on_its_neighbours(name: str) -> None:
    """Within the original length a short prompt's text is the same beside a long one; a longer context is refused."""
    model = tiny(SERVED[name])
    short, long = prompts()[0], prompts()[2]
    with running(model, ORIGINAL) as engine:
        alone = run(engine.generate(short, Sampling(20)))[0].ids
        # The long one reaches the last position that the context allows while the short one is decoded.
        beside = run(engine.generate(long, Sampling(ORIGINAL - len(long))), engine.generate(short, Sampling(20)))
        assert beside[1].ids == alone
    assert families.default_context(model) == ORIGINAL
    for engine_name, key in (("slm", "slm.context"), ("teacher", "teacher.context"), ("s2t-local", "slm.context")):
        with (
            pytest.raises(UnsupportedModel, match=f"^{key} = 100: .* set {key} to {ORIGINAL} or less$"),
            running(model, 100, engine_name),
        ):
            pass
    with (  # what the configuration does not tell shows in the comparison
        patch.object(families, "check_configuration"),
        pytest.raises(UnsupportedModel, match="nats off"),
        running(model, 100),
    ):
        pass


def test_learned_positions_end_where_they_end() -> None:
    model = tiny(SERVED["gpt2"])
    assert families.default_context(model) == 128
    with (
        pytest.raises(UnsupportedModel, match=r"^slm\.context = 129: gpt2 has positions for 128 tokens"),
        running(model, 129),
    ):
        pass


def test_lora_targets_are_those_of_the_family() -> None:
    every = {
        name: set(lora_targets(tiny(SERVED[name]), LoraSettings())) for name in ("qwen2", "phi3, longrope", "gpt2")
    }
    assert every == {
        "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "phi3, longrope": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "gpt2": {"c_attn", "c_proj", "c_fc"},
    }
    transposed = {name: lora_config(tiny(SERVED[name]), LoraSettings()).fan_in_fan_out for name in every}
    assert transposed == {"qwen2": False, "phi3, longrope": False, "gpt2": True}
    model = tiny(SERVED["phi3, longrope"])
    adapted = Selector(
        copy.deepcopy(model), RESERVED, LoraSettings(rank=2, targets=("mlp.down_proj", "qkv_proj"))
    ).trained()
    assert {name.split(".")[-4] for name in adapted if "lora" in name} == {"down_proj", "qkv_proj"}
    with pytest.raises(
        RecipeError, match=r"^distil\.lora\.targets: phi3 has no linear layers called q_proj, lm_head; it has "
    ):
        Selector(model, RESERVED, LoraSettings(targets=("q_proj", "o_proj", "lm_head")))
