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
from s2t_models.reserved import bins, reserved_ids
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


def test_multinomial_with_k_of_the_whole_support_is_the_support():
    logprobs_N = np.log([0.9999999, 1e-7, 1e-9, 1e-12])
    for seed in range(50):
        assert propose(logprobs_N, 4, "multinomial", uniforms_K=uniforms(seed, 0, 4)).tolist() == [0, 1, 2, 3]


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
