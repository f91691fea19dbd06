"""The selector: the readout, what training may change, the frozen base beneath it, and merging."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_tree import SIZES, random_tree
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2t_models.reserved import bins
from s2t_models.training import losses
from s2t_models.training.selector import ROWS, Selector, score
from s2t_models.training.tree import pack
from s2t_models.training_settings import LoraSettings

#: One block at the end of the vocabulary, and one with unused rows above it.
BLOCKS = {"last rows": range(88, 96), "rows below the last": range(80, 88)}
LORA = LoraSettings(rank=4, alpha=8, dropout=0.1)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=request.param)).eval()


def train_a_little(selector: Selector, steps: int = 3) -> None:
    """A few optimiser steps on random trees with all parts of the objective."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW([p for p in selector.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    selector.train()
    for _ in range(steps):
        batch = pack([random_tree(rng, 5, 12, 4, 5), random_tree(rng, 8, 10, 3, 5)])
        batch.ids_BL.clamp_(max=79)  # text only
        with selector.as_base():
            base_SV = selector.text_logits(batch.states(selector(**batch.inputs(leaves=False))))
        hidden_BLH = selector(**batch.inputs())
        scores_GK = selector.scores(batch.leaves(hidden_BLH))
        drift_S = losses.stability(base_SV, selector.text_logits(batch.states(hidden_BLH)))
        target_G = torch.randint(5, (7,))
        loss = losses.selection(scores_GK / 0.1, target_G, batch.valid_GK) + drift_S.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    selector.eval()


def test_score_is_the_bins_expectation():
    logits_R = torch.tensor([[1.0, 2.0, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0]])
    expected = [sum(p * r / 3 for r, p in enumerate(row.softmax(0))) for row in logits_R]
    torch.testing.assert_close(score(logits_R, bins(4)), torch.stack(expected))
    assert score(logits_R, bins(4))[1].item() == pytest.approx(0.5)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
def test_merged_model_differs_in_the_adapted_linears_and_the_reserved_rows_alone(base, block):
    before = copy.deepcopy(base.state_dict())
    selector = Selector(base, block, LORA)
    train_a_little(selector)
    frozen = dict(selector.adapted.base_model.model.named_parameters())
    unchanged = [name for name, value in frozen.items() if not value.requires_grad]
    for name in unchanged:
        assert torch.equal(frozen[name], before[name.replace(".base_layer", "")]), name
    merged = selector.merge()
    assert type(merged) is Qwen2ForCausalLM
    assert set(merged.state_dict()) == set(before)
    rows = torch.zeros(96, dtype=torch.bool)
    rows[list(block)] = True
    for name, value in merged.state_dict().items():
        adapted = any(name.endswith(f"{target}.weight") for target in LINEARS)
        is_output = name == "lm_head.weight" or (
            name == "model.embed_tokens.weight" and base.config.tie_word_embeddings
        )
        if is_output:
            assert torch.equal(value[~rows], before[name][~rows])
            assert (value[rows] != before[name][rows]).any(dim=1).all()
        elif adapted:
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name


@torch.no_grad()
def test_as_base_gives_the_frozen_models_logits(base):
    before = copy.deepcopy(base)
    selector = Selector(base, BLOCKS["rows below the last"], LORA)
    with torch.enable_grad():
        train_a_little(selector)
    ids = torch.randint(80, (2, 9))
    expected = before(ids).logits
    selector.train()
    with selector.as_base():
        hidden = selector(input_ids=ids)
    assert selector.training
    text = torch.ones(96, dtype=torch.bool).index_fill(0, torch.arange(80, 88), False)
    torch.testing.assert_close(selector.text_logits(hidden)[..., text], expected[..., text], atol=1e-5, rtol=0)
    assert (selector.text_logits(hidden).softmax(-1)[..., ~text] == 0).all()
    selector.eval()
    assert (selector.text_logits(selector(input_ids=ids)) - expected)[..., text].abs().max() > 1e-2


def test_as_base_leaves_frozen_what_was_frozen(base):
    selector = Selector(base, BLOCKS["last rows"], LORA)
    for name, value in selector.named_parameters():
        value.requires_grad_(name == ROWS)
    with pytest.raises(RuntimeError, match="out of memory"), selector.as_base():
        raise RuntimeError("out of memory")
    assert list(selector.trained()) == [ROWS]


@torch.no_grad()
def test_merging_keeps_logits_and_scores(base):
    block = BLOCKS["last rows"]
    selector = Selector(base, block, LORA)
    with torch.enable_grad():
        train_a_little(selector)
    ids = torch.randint(80, (2, 9))
    hidden = selector(input_ids=ids)
    scores, text = selector.scores(hidden), selector.text_logits(hidden)
    logits = selector.merge()(ids).logits
    torch.testing.assert_close(logits[..., :88], text[..., :88], atol=1e-4, rtol=0)
    torch.testing.assert_close(score(logits[..., list(block)], bins(8)), scores, atol=1e-5, rtol=0)


@torch.no_grad()
def test_merging_into_bfloat16_rounds_once(base):
    """The merged weights are the float32 sum of base and LoRA, rounded; the factors stay float32 while they are
    trained."""
    before = {name: value.float() for name, value in base.bfloat16().state_dict().items()}
    selector = Selector(base, BLOCKS["last rows"], LORA)
    with torch.enable_grad():
        train_a_little(selector)
    factors = {name: value for name, value in selector.trained().items() if name != ROWS}
    assert {value.dtype for value in factors.values()} == {torch.float32}
    merged = selector.merge().state_dict()
    for name, a_factor in factors.items():
        if ".lora_A." in name:
            delta = LORA.alpha / LORA.rank * factors[name.replace(".lora_A.", ".lora_B.")] @ a_factor
            weight = name.removeprefix("adapted.base_model.model.").replace(".lora_A.default", "")
            assert torch.equal(merged[weight], (before[weight] + delta).bfloat16()), weight


def test_trained_tensors_carry_the_whole_training(base):
    other = copy.deepcopy(base)
    selector = Selector(base, BLOCKS["last rows"], LORA)
    train_a_little(selector)
    restored = Selector(other, BLOCKS["last rows"], LORA)
    restored.eval().load_trained(selector.trained())
    ids = torch.randint(80, (1, 7))
    torch.testing.assert_close(restored(input_ids=ids), selector(input_ids=ids))
    assert torch.equal(restored.rows_RH, selector.rows_RH)
    with pytest.raises(KeyError):
        restored.load_trained({})
