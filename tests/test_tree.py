"""The tree-masked forward against one separate forward a candidate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_families import SERVED, tiny
from transformers import PreTrainedModel

from s2t_models.training.tree import Tree, pack
from s2t_models.training.tree_attention import decode, use_tree_attention

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}


def random_tree(rng: np.random.Generator, prompt: int, output: int, groups: int, k: int) -> Tree:
    steps = np.sort(rng.choice(output, groups, replace=False))
    return Tree(rng.integers(0, 96, prompt + output), prompt, prompt + steps, rng.integers(0, 96, (groups, k)))


@pytest.fixture(params=["qwen2", "qwen3", "llama", "phi3, longrope", "mistral", "gemma2", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """The last three have sliding windows of 8 tokens, shorter than most trees here; Gemma 2 caps its attention."""
    return tiny(SERVED[request.param])


@torch.no_grad()
def test_leaves_and_states_equal_separate_forwards(model):
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, 5, 9, 3, 4), random_tree(rng, 12, 20, 5, 4), random_tree(rng, 3, 1, 1, 2)]
    trees[1].candidates_GK[2, 1:] = -1  # a group of one candidate
    batch = pack(trees)
    use_tree_attention(model)
    hidden_BLH = decode(model, **batch.inputs())
    leaf_GKH, state_SH = batch.leaves(hidden_BLH), batch.states(hidden_BLH)
    model.set_attn_implementation("eager")

    def separate(tokens: Sequence[int]) -> torch.Tensor:
        """transformers' own hidden states of a text, [T, H]."""
        return model.get_decoder()(torch.tensor([list(tokens)]), use_cache=False).last_hidden_state[0]

    group = state = 0
    for tree in trees:
        for prefix, candidates_K in zip(tree.prefixes_G, tree.candidates_GK, strict=True):
            for k, candidate in enumerate(candidates_K):
                assert batch.valid_GK[group, k] == (candidate >= 0)
                if candidate >= 0:
                    own_H = separate([*tree.tokens[:prefix], candidate])[-1]
                    torch.testing.assert_close(leaf_GKH[group, k], own_H, atol=1e-4, rtol=0)
            own_H = separate(tree.tokens[:prefix])[-1]
            torch.testing.assert_close(state_SH[batch.state_G[group]], own_H, atol=1e-4, rtol=0)
            group += 1
        steps = len(tree.tokens) - tree.prompt
        own_TH = separate(tree.tokens)[tree.prompt - 1 : -1]
        torch.testing.assert_close(state_SH[state : state + steps], own_TH, atol=1e-4, rtol=0)
        state += steps
    assert group == len(batch.row_G)
    assert state == len(batch.row_S)


@torch.no_grad()
def test_the_trajectories_alone_give_the_same_states(model):
    rng = np.random.default_rng(2)
    batch = pack([random_tree(rng, 4, 8, 2, 3), random_tree(rng, 6, 15, 4, 3)])
    use_tree_attention(model)
    whole = batch.states(decode(model, **batch.inputs()))
    alone = batch.states(decode(model, **batch.inputs(leaves=False)))
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    assert batch.inputs(leaves=False)["input_ids"].shape == (2, 21)


def test_a_trajectory_without_groups_or_candidates_packs(model):
    tokens = np.arange(10)
    empty = Tree(tokens, 4, np.zeros(0, dtype=int), np.zeros((0, 3), dtype=int))
    unlabelled = Tree(tokens, 4, np.array([5, 7]), np.zeros((2, 0), dtype=int))
    batch = pack([empty, unlabelled])
    assert batch.ids_BL.shape == (2, 10)
    assert batch.leaf_GK.shape == (2, 3)
    assert not batch.valid_GK.any()
    assert batch.state_G.tolist() == [6 + 1, 6 + 3]
