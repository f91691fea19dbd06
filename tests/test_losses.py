"""The losses and their gradients against loops that spell the paper's formulas out, one group and one token at a
time."""

from __future__ import annotations

import math

import pytest
import torch

from s2t_models.training import losses

T, W = 0.1, 0.7


@pytest.fixture
def groups() -> dict[str, torch.Tensor]:
    """Five groups of up to four candidates, one of a single candidate."""
    generator = torch.Generator().manual_seed(3)
    valid_GK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    return {
        "valid": valid_GK,
        "scores": torch.rand(5, 4, generator=generator, dtype=torch.float64),
        "slm": torch.rand(5, 4, generator=generator, dtype=torch.float64).log(),
        "teacher": torch.randn(5, 4, generator=generator, dtype=torch.float64).log_softmax(-1),
    }


def loop_selection(scores, slm, teacher, valid, w):
    """Eq. 7, with the prior's term where w > 0."""
    total = 0.0
    for g in range(len(scores)):
        members = [k for k in range(scores.shape[1]) if valid[g, k]]
        best = max(members, key=lambda k: teacher[g, k].item())
        terms = {k: scores[g, k] / T + w * slm[g, k] for k in members}
        total = total - (terms[best] - torch.stack(list(terms.values())).exp().sum().log())
    return total / len(scores)


def deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def loop_margin(scores, slm, teacher, valid, w, spread):
    """Eqs. 13 and 14: max(0, m_eff - (s(c*) - s(c-))) in units of the loss's logits, m_eff = std(s) / T, with the
    deviation of the group's own scores or of all scores in the batch."""
    total = torch.zeros((), dtype=scores.dtype)
    everything = [scores[g, k].item() for g in range(len(scores)) for k in range(scores.shape[1]) if valid[g, k]]
    for g in range(len(scores)):
        members = [k for k in range(scores.shape[1]) if valid[g, k]]
        best = max(members, key=lambda k: teacher[g, k].item())
        wrong = [scores[g, k] / T + w * slm[g, k] for k in members if k != best]
        if not wrong:
            continue
        effective = deviation([scores[g, k].item() for k in members] if spread == "group" else everything) / T
        hinge = effective - (scores[g, best] / T + w * slm[g, best] - torch.stack(wrong).max())
        total = total + torch.clamp(hinge, min=0)
    return total / len(scores)


@pytest.mark.parametrize("w", [0.0, W])
@pytest.mark.parametrize("name", ["selection", "group margin", "batch margin"])
def test_value_and_gradient_equal_a_loop(groups, name, w):
    fast = groups["scores"].clone().requires_grad_()
    slow = groups["scores"].clone().requires_grad_()
    target_G, _ = losses.teacher_choice(groups["teacher"], groups["valid"])
    preference_GK = losses.preference(fast, groups["slm"], T, w)
    if name == "selection":
        value = losses.selection(preference_GK, target_G, groups["valid"])
        expected = loop_selection(slow, groups["slm"], groups["teacher"], groups["valid"], w)
    else:
        spread = name.removesuffix(" margin")
        value = losses.margin(preference_GK, fast, target_G, groups["valid"], T, spread)
        expected = loop_margin(slow, groups["slm"], groups["teacher"], groups["valid"], w, spread)
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-9)
    value.backward()
    expected.backward()
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-9, rtol=1e-9)
    assert fast.grad.abs().sum() > 0


def test_teacher_choice_gives_the_best_real_candidate_and_its_margin(groups):
    target_G, margin_G = losses.teacher_choice(groups["teacher"], groups["valid"])
    for g in range(5):
        real = sorted((groups["teacher"][g, k].exp().item(), k) for k in range(4) if groups["valid"][g, k])
        assert target_G[g] == real[-1][1]
        second = real[-2][0] if len(real) > 1 else 0.0
        assert margin_G[g].item() == pytest.approx(real[-1][0] - second, abs=1e-9)


def test_stability_is_the_kl_of_base_to_tuned_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(6, 11, generator=generator, dtype=torch.float64)
    fast = torch.randn(6, 11, generator=generator, dtype=torch.float64).requires_grad_()
    slow = fast.detach().clone().requires_grad_()
    expected = []
    for s in range(6):
        p, q = base[s].exp() / base[s].exp().sum(), slow[s].exp() / slow[s].exp().sum()
        expected.append(sum(p[v] * (p[v] / q[v]).log() for v in range(11)))
    value_S = losses.stability(base, fast)
    torch.testing.assert_close(value_S, torch.stack(expected), atol=1e-9, rtol=1e-9)
    value_S.mean().backward()
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(losses.stability(base, base), torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_a_batch_without_groups_costs_nothing_and_still_has_a_gradient(spread):
    scores = torch.zeros(0, 4, requires_grad=True)
    valid, target = torch.zeros(0, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.long)
    preference = losses.preference(scores, torch.zeros(0, 4), T, W)
    loss = losses.selection(preference, target, valid) + losses.margin(preference, scores, target, valid, T, spread)
    loss.backward()
    assert loss.item() == 0.0
