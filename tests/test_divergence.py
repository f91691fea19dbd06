"""Divergence, noise, candidates and reserved rows against brute force and closed forms."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from s2t_models.candidates import propose
from s2t_models.divergence import divergence
from s2t_models.noise import uniforms
from s2t_models.recipe import RecipeError
from s2t_models.reserved import bins, free_rows, reserved_ids
from s2t_models.settings import ReservedSettings


def distributions(seed: int, steps: int = 40, vocabulary: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p_TV, q_TV = (4 * torch.randn(2, steps, vocabulary, generator=generator)).log_softmax(-1)
    return p_TV, q_TV


def on_support(p_TV: torch.Tensor, q_TV: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    p_TN, ids_TN = p_TV.topk(n, dim=-1)
    return p_TN, q_TV.gather(-1, ids_TN)


def test_over_the_whole_vocabulary_it_is_the_kl_by_brute_force():
    p_TV, q_TV = distributions(0)
    for t, kl in enumerate(divergence(*on_support(p_TV, q_TV, 300))):
        p, q = p_TV[t].double().exp().tolist(), q_TV[t].double().exp().tolist()
        assert float(kl) == pytest.approx(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-4)


def test_the_tail_bucket_is_one_more_outcome_and_never_above_the_whole_kl():
    p_TV, q_TV = distributions(1)
    whole_T = divergence(p_TV, q_TV)
    for n in (1, 4, 64):
        p_TN, q_TN = on_support(p_TV, q_TV, n)
        p_TN1 = torch.cat([p_TN, (1 - p_TN.double().exp().sum(-1, keepdim=True)).log()], -1)
        q_TN1 = torch.cat([q_TN, (1 - q_TN.double().exp().sum(-1, keepdim=True)).log()], -1)
        expected_T = (p_TN1.exp() * (p_TN1 - q_TN1)).sum(-1)
        bucket_T = divergence(p_TN, q_TN)
        torch.testing.assert_close(bucket_T, expected_T.float(), atol=1e-4, rtol=1e-3)
        assert (bucket_T <= whole_T + 1e-4).all()


def test_the_published_variant_renormalises_both_on_the_support():
    p_TN, q_TN = on_support(*distributions(2), 64)
    p, q = p_TN.exp() / p_TN.exp().sum(-1, keepdim=True), q_TN.exp() / q_TN.exp().sum(-1, keepdim=True)
    expected_T = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(p_TN, q_TN, "renormalised"), expected_T, atol=1e-4, rtol=1e-3)


def test_equal_distributions_do_not_diverge_and_certain_ones_stay_finite():
    p_TV, _ = distributions(3)
    assert divergence(*on_support(p_TV, p_TV, 64)).max() < 1e-4
    certain = torch.tensor([[0.0, -120.0]])
    opposed = torch.tensor([[-90.0, 0.0]])
    assert float(divergence(certain, opposed)) == pytest.approx(90.0, rel=1e-3)


def test_noise_is_of_seed_step_and_stream_alone():
    assert (uniforms(7, 3, 5) == uniforms(7, 3, 8)[:5]).all()
    streams = [
        tuple(uniforms(s, t, 2, name)) for s, t, name in itertools.product((0, 7), (0, 3), ("token", "candidates"))
    ]
    assert len(set(streams)) == len(streams)
    many = np.concatenate([uniforms(1, step, 4) for step in range(5000)])
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(many.var() - 1 / 12) < 0.005


def test_top_k_and_ratio():
    logprobs_N = np.log([0.5, 0.3, 0.1, 0.06, 0.04])
    assert propose(logprobs_N, 3, "top_k").tolist() == [0, 1, 2]
    assert propose(logprobs_N, 5, "top_k", ratio=0.15).tolist() == [0, 1, 2]
    assert propose(np.log([1.0, 0.0 + 1e-300]), 8, "top_k").tolist() == [0, 1]


def test_multinomial_draws_without_replacement_follow_their_law():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    counts = Counter(
        tuple(propose(np.log(p), 2, "multinomial", uniforms_K=uniforms(seed, 0, 2, "candidates")).tolist())
        for seed in range(20000)
    )
    for pair in itertools.combinations(range(4), 2):
        a, b = p[list(pair)]
        expected = a * b / (1 - a) + b * a / (1 - b)
        assert counts[pair] / 20000 == pytest.approx(expected, abs=0.015)


def test_candidates_are_drawn_at_a_temperature_from_the_nucleus():
    """Table A15: the law of the draws is that of the tempered distribution, cut to the fewest that hold top-p."""
    logprobs_N = np.log([0.5, 0.3, 0.15, 0.05])
    tempered = np.array([0.5, 0.3, 0.15, 0.05]) ** (1 / 0.6)
    tempered /= tempered.sum()  # 0.60, 0.26, 0.08, 0.01
    for top_p, kept in ((0.5, 1), (0.7, 2), (0.95, 3), (1.0, 4)):
        assert (np.cumsum(tempered) < top_p).sum() + 1 == kept or top_p == 1.0
        everything = propose(logprobs_N, 4, "multinomial", 0.0, uniforms(1, 0, 4), 0.6, top_p)
        assert everything.tolist() == list(range(kept))
        assert propose(logprobs_N, 4, "top_k", 0.0, None, 0.6, top_p).tolist() == list(range(kept))
    drawn = Counter(
        int(propose(logprobs_N, 1, "multinomial", 0.0, uniforms(seed, 0, 1), 0.6, 0.7)[0]) for seed in range(20000)
    )
    assert drawn[0] / 20000 == pytest.approx(tempered[0] / tempered[:2].sum(), abs=0.01)
    assert set(drawn) == {0, 1}


def test_multinomial_with_k_of_the_whole_support_is_the_support():
    logprobs_N = np.log([0.9999999, 1e-7, 1e-9, 1e-12])
    for seed in range(50):
        assert propose(logprobs_N, 4, "multinomial", uniforms_K=uniforms(seed, 0, 4)).tolist() == [0, 1, 2, 3]


class Vocabulary:
    """As much of a tokenizer as the search for free rows reads: tokens by name behind `ordinary` others."""

    def __init__(self, ordinary: int, tokens: dict[str, int]) -> None:
        taken = set(tokens.values())
        self.tokens = {f"t{row}": row for row in range(ordinary) if row not in taken} | tokens

    def get_vocab(self) -> dict[str, int]:
        return self.tokens


#: The published layouts: the model's rows, its tokenizer, and the rows that no text uses.
LAYOUTS = {
    "qwen2.5-0.5b": (151936, Vocabulary(151665, {}), range(151665, 151936)),
    "llama-3.1": (
        128256,
        Vocabulary(
            128000,
            {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004}
            | {f"<|reserved_special_token_{n}|>": row for n, row in enumerate((128002, 128003, 128005))}
            | {"<|start_header_id|>": 128006, "<|end_header_id|>": 128007}
            | {"<|eom_id|>": 128008, "<|eot_id|>": 128009, "<|python_tag|>": 128010}
            | {f"<|reserved_special_token_{n}|>": 128008 + n for n in range(3, 248)},
        ),
        (128002, 128003, 128005, *range(128011, 128256)),
    ),
    "phi-3-mini": (
        32064,
        Vocabulary(
            32000,
            {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006, "<|end|>": 32007, "<|user|>": 32010}
            | {f"<|placeholder{n}|>": row for n, row in enumerate((32002, 32003, 32004, 32005, 32008, 32009), 1)},
        ),
        (*range(32002, 32006), 32008, 32009, *range(32011, 32064)),
    ),
    "gemma-2": (
        256000,
        Vocabulary(256000, {f"<unused{n}>": 7 + n for n in range(99)} | {"<unused99>": 255999}),
        (*range(7, 106), 255999),
    ),
    "gemma-3": (
        262144,
        Vocabulary(256001, {f"<unused{n}>": (6 if n < 99 else 255902) + n for n in range(6242)}),
        (*range(6, 105), *range(256001, 262144)),
    ),
    "mistral-v0.3": (32768, Vocabulary(32768, {f"[control_{n}]": 2 + n for n in range(8, 769)}), range(10, 771)),
    "smollm2": (49152, Vocabulary(49152, {"<repo_name>": 3, "<reponame>": 4, "<file_sep>": 5}), ()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_free_rows_are_found_in_the_published_layouts(name: str) -> None:
    rows, tokenizer, expected = LAYOUTS[name]
    free = free_rows(rows, tokenizer)  # type: ignore[arg-type]
    assert free == tuple(expected)
    assert reserved_ids(free, ReservedSettings()) == free[-16:]


def test_reserved_rows_are_the_highest_free_ones_or_the_block_that_is_asked_for():
    qwen = tuple(range(151665, 151936))
    assert reserved_ids(qwen, ReservedSettings(count=16)) == tuple(range(151920, 151936))
    assert reserved_ids(qwen, ReservedSettings(count=12, first=151920)) == tuple(range(151920, 151932))
    scattered = (5, 9, *range(20, 24), 30)
    assert reserved_ids(scattered, ReservedSettings(count=3)) == (22, 23, 30)
    assert reserved_ids(scattered, ReservedSettings(count=8)) == ()  # an auxiliary head in their place
    assert reserved_ids(scattered, ReservedSettings(count=3, kind="head")) == ()
    with pytest.raises(RecipeError, match=r"^reserved.count = 8: the vocabulary has 7 free rows; .*reserved.kind=head"):
        reserved_ids(scattered, ReservedSettings(count=8, kind="rows"))
    with pytest.raises(RecipeError, match=r"^reserved.first = 21: row 24 is not free; free are 7 rows from 5 to 30; "):
        reserved_ids(scattered, ReservedSettings(count=4, first=21))
    assert bins(5).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
