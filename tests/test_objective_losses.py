"""The losses of the ablations and of the trained baselines, with their gradients, against loops in float64 that spell
the formulas out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from s2t_models.divergence import divergence
from s2t_models.training import losses
from s2t_models.training.batches import NO_CANDIDATE
from s2t_models.training.objectives import tsd_kd
from s2t_models.training.objectives.base import Outputs, Reading
from s2t_models.training.objectives.tsd_kd import TsdKdObjective
from s2t_models.training.objectives.two_stage import TwoStageObjective, forward_kl
from s2t_models.training_settings import DistilSettings, TsdKdSettings, TwoStageSettings

VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def members(g: int) -> list[int]:
    return [k for k in range(VALID.shape[1]) if VALID[g, k]]


def same_with_gradient(
    fast: Callable[[torch.Tensor], torch.Tensor], slow: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor
) -> None:
    one, other = at.clone().requires_grad_(), at.clone().requires_grad_()
    value, expected = fast(one), slow(other)
    torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-7)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, atol=1e-9, rtol=1e-7)
    assert one.grad is not None
    assert one.grad.abs().sum() > 0


def test_listmle_is_the_probability_of_the_teachers_order_among_all_orders():
    teacher_GK = drawn(4, 4, seed=1)

    def probability(logits: list[torch.Tensor], order: tuple[int, ...]) -> torch.Tensor:
        left, found = list(order), torch.ones((), dtype=torch.float64)
        for k in order:
            found = found * logits[k].exp() / torch.stack([logits[j].exp() for j in left]).sum()
            left.remove(k)
        return found

    def slow(logits_GK: torch.Tensor) -> torch.Tensor:
        out = []
        for g in range(4):
            order = tuple(sorted(members(g), key=lambda k: -teacher_GK[g, k].item()))
            every = [probability(list(logits_GK[g]), other) for other in itertools.permutations(members(g))]
            assert float(sum(every).detach()) == pytest.approx(1.0)
            out.append(-probability(list(logits_GK[g]), order).log())
        return torch.stack(out)

    same_with_gradient(lambda logits_GK: losses.list_mle(logits_GK, teacher_GK, VALID), slow, drawn(4, 4))
    best_first = losses.list_mle(torch.tensor([[9.0, 5.0, 1.0]]), torch.tensor([[3.0, 2.0, 1.0]]), VALID[:1, :3])
    worst_first = losses.list_mle(torch.tensor([[1.0, 5.0, 9.0]]), torch.tensor([[3.0, 2.0, 1.0]]), VALID[:1, :3])
    assert best_first < 0.1 < worst_first


def test_pointwise_is_a_binary_cross_entropy_of_each_candidate():
    target_G = torch.tensor([2, 0, 1, 0])

    def slow(scores_GK: torch.Tensor) -> torch.Tensor:
        terms = [
            -(scores_GK[g, k] if k == target_G[g] else 1 - scores_GK[g, k]).log() for g in range(4) for k in members(g)
        ]
        return torch.stack(terms).mean()

    same_with_gradient(lambda scores: losses.pointwise(scores, target_G, VALID), slow, drawn(4, 4).sigmoid())


def test_soft_labels_are_a_kl_over_the_candidates():
    teacher_GK = drawn(4, 4, seed=1).log_softmax(-1)

    def slow(preference_GK: torch.Tensor) -> torch.Tensor:
        out = []
        for g in range(4):
            given = sum(teacher_GK[g, k].exp() for k in members(g))
            own = torch.stack([preference_GK[g, k].exp() for k in members(g)]).sum()
            shares = [(teacher_GK[g, k].exp() / given, preference_GK[g, k].exp() / own) for k in members(g)]
            out.append(torch.stack([p * (p / q).log() for p, q in shares]).sum())
        return torch.stack(out)

    same_with_gradient(lambda own: losses.soft_labels(own, teacher_GK, VALID), slow, drawn(4, 4))


def loop_entropy(p_V: torch.Tensor) -> torch.Tensor:
    return -torch.stack([p * p.log() for p in p_V]).sum()


def loop_jsd(logits_V: torch.Tensor, teacher_V: torch.Tensor, beta: float) -> torch.Tensor:
    p_V, q_V = logits_V.exp() / logits_V.exp().sum(), teacher_V.exp() / teacher_V.exp().sum()
    weight = 1 / (1 + math.exp(loop_entropy(q_V).item() - loop_entropy(p_V).item()))
    total = torch.zeros((), dtype=torch.float64)
    for p, q in zip(p_V, q_V, strict=True):
        mixed = beta * q + (1 - beta) * p
        total = total + beta * q * (q / mixed).log() + (1 - beta) * p * (p / mixed).log()
    return weight * total


def loop_ranking(logits_V: torch.Tensor, teacher_V: torch.Tensor, k: int) -> torch.Tensor:
    best = sorted(range(len(teacher_V)), key=lambda v: -logits_V[v].item())[:k]
    order = sorted(best, key=lambda v: -teacher_V[v].item())
    total = torch.zeros((), dtype=torch.float64)
    for place, v in enumerate(order):
        total = total + torch.stack([logits_V[u].exp() for u in order[place:]]).sum().log() - logits_V[v]
    return total


@pytest.mark.parametrize("rows", [7, 6], ids=["one vocabulary", "the teacher's is shorter"])
def test_tsd_kd_of_each_state_is_what_the_formulas_say(rows: int):
    teacher_SV = drawn(5, rows, seed=1)
    same_with_gradient(
        lambda logits_SV: tsd_kd.weighted_jsd(logits_SV, teacher_SV, 0.9),
        lambda logits_SV: torch.stack([loop_jsd(logits_SV[s, :rows], teacher_SV[s], 0.9) for s in range(5)]),
        drawn(5, 7),
    )
    same_with_gradient(
        lambda logits_SV: tsd_kd.ranking_loss(logits_SV, teacher_SV, 3),
        lambda logits_SV: torch.stack([loop_ranking(logits_SV[s, :rows], teacher_SV[s], 3) for s in range(5)]),
        drawn(5, 7),
    )
    same_with_gradient(
        tsd_kd.entropy,
        lambda logits_SV: torch.stack([loop_entropy(v.exp() / v.exp().sum()) for v in logits_SV]),
        drawn(5, 7),
    )


def test_masked_rows_cost_nothing_and_have_no_gradient():
    never = torch.finfo(torch.float32).min / 2
    logits_SV = drawn(3, 5).float().index_fill(1, torch.tensor([4]), never).requires_grad_()
    teacher_SV = drawn(3, 5, seed=1).float().index_fill(1, torch.tensor([4]), never)
    value = tsd_kd.weighted_jsd(logits_SV, teacher_SV, 0.9) + tsd_kd.entropy(logits_SV)
    short = tsd_kd.weighted_jsd(logits_SV[:, :4], teacher_SV[:, :4], 0.9) + tsd_kd.entropy(logits_SV[:, :4])
    torch.testing.assert_close(value, short)
    value.sum().backward()
    assert logits_SV.grad is not None
    assert logits_SV.grad.isfinite().all()
    assert (logits_SV.grad[:, 4] == 0).all()


def test_shares_are_of_each_text_by_itself():
    entropy_S = torch.tensor([0.1, 0.4, 0.2, 0.3, 9.0, 1.0, 0.04, 0.05, 0.91])
    lengths = [4, 2, 3]
    assert tsd_kd.highest(entropy_S, lengths, 0.5).tolist() == [1, 3, 4, 7, 8]
    assert sum(tsd_kd.share_of(n, 0.5) for n in lengths) == 5
    # The first text begins with 0.1 of its entropy, the second with 0.9, the third with 0.04 and 0.05.
    weights = tsd_kd.opening_weights(entropy_S, lengths, 0.11)
    assert weights.tolist() == pytest.approx([1 / 3, 0, 0, 0, 0, 0, 1 / 6, 1 / 6, 0])
    assert tsd_kd.opening_weights(torch.zeros(3), [3], 0.1).tolist() == [0, 0, 0]


H, V = 4, 7


def outputs(**changes: Any) -> Outputs:
    head_VH = drawn(V, H, seed=9)
    given: dict[str, Any] = {
        "base_SH": None,
        "tuned_SH": drawn(5, H).requires_grad_(),
        "scores_GK": torch.zeros(0, 0),
        "text_logits": lambda hidden: hidden @ head_VH.T,
        "vocabulary": V,
    }
    return Outputs(**given | changes)


def test_tsd_kd_adds_its_terms_up_as_the_settings_weight_them():
    settings = TsdKdSettings(beta=0.8, entropy=0.5, entropy_share=0.5, ranking=0.3, ranking_k=3, opening=0.6)
    teacher_VH = drawn(V, H, seed=8)
    teacher_SH = drawn(5, H, seed=7)
    found = outputs(teacher=Reading(teacher_SH, lambda hidden: hidden @ teacher_VH.T))
    batch = SimpleNamespace(packed=SimpleNamespace(row_S=torch.tensor([0, 0, 0, 1, 1])))
    terms = TsdKdObjective(DistilSettings(tsd_kd=settings)).terms(cast(Any, batch), found)

    logits_SV = found.text_logits(found.tuned_SH.detach())
    teacher_SV = teacher_SH @ teacher_VH.T
    entropy_S = [loop_entropy(row.softmax(-1)).item() for row in logits_SV]
    unsure = sorted(range(3), key=lambda s: -entropy_S[s])[:2] + sorted((3, 4), key=lambda s: -entropy_S[s])[:1]
    ranking = 0.0
    for text in ((0, 1, 2), (3, 4)):
        total, so_far, opening = sum(entropy_S[s] for s in text), 0.0, []
        for s in text:
            so_far += entropy_S[s]
            if so_far < 0.6 * total:
                opening.append(loop_ranking(logits_SV[s], teacher_SV[s], 3).item())
        ranking += sum(opening) / max(len(opening), 1) / 2
    assert ranking > 0
    expected = {
        "jsd_loss": (sum(loop_jsd(logits_SV[s], teacher_SV[s], 0.8).item() for s in range(5)) / 5, 1.0, "states"),
        "entropy_loss": (sum(entropy_S[s] for s in unsure) / 3, 0.5, "unsure"),
        "ranking_loss": (ranking, 0.3, "texts"),
    }
    assert {term.name: (pytest.approx(term.value.item()), term.weight, term.per) for term in terms} == expected


@pytest.mark.parametrize("progress", [0.4, 0.5])
def test_distil_learns_the_texts_first_and_then_the_teachers_best_tokens_too(progress: float):
    settings = TwoStageSettings(supervised=0.5, kl=0.1, top=2)
    found = outputs(progress=progress)
    written_S, state_G = torch.tensor([3, 1, 0, 6, 2]), torch.tensor([0, 1, 2, 3, 4])
    teacher_SV = drawn(5, V, seed=3).log_softmax(-1)
    best = teacher_SV.topk(3)
    batch = SimpleNamespace(
        packed=SimpleNamespace(written_S=written_S, state_G=state_G),
        candidates_GK=best.indices,
        teacher_logprobs_GK=best.values,
    )
    terms = TwoStageObjective(DistilSettings(two_stage=settings)).terms(cast(Any, batch), found)
    loss = sum(term.weight * term.value for term in terms)
    loss.backward()  # type: ignore[union-attr]
    given = found.tuned_SH.grad

    tuned_SH = found.tuned_SH.detach().clone().requires_grad_()
    own_SV = found.text_logits(tuned_SH).softmax(-1)
    texts = -torch.stack([own_SV[s, written_S[s]].log() for s in range(5)]).mean()
    kl = []
    for s in range(5):
        pairs = [(teacher_SV[s, v].exp(), own_SV[s, v]) for v in best.indices[s, :2].tolist()]
        pairs.append((1 - sum(p for p, _ in pairs), 1 - sum(q for _, q in pairs)))
        kl.append(torch.stack([p * (p / q).log() for p, q in pairs]).sum())
    expected = texts if progress < 0.5 else 0.9 * texts + 0.1 * torch.stack(kl).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(given, tuned_SH.grad, atol=1e-6, rtol=1e-6)


def test_the_forward_kl_has_a_gradient_where_the_teacher_is_certain_and_is_the_divergence_elsewhere():
    """Of a certain teacher's top tokens the rest has nothing; of a few candidates some places hold none."""
    certain_V = torch.tensor([0.0, -40.0, -50.0, -60.0, -1e4]).log_softmax(-1)
    teacher_SV = torch.stack([certain_V, drawn(5, seed=4).log_softmax(-1).float()])
    best = teacher_SV.topk(3)
    ids_SN = torch.cat([best.indices, torch.full((2, 1), -1)], dim=1)
    logprobs_SN = torch.cat([best.values, torch.full((2, 1), NO_CANDIDATE)], dim=1)
    logits_SV = drawn(2, 5, seed=5).float().requires_grad_()
    kl_S = forward_kl(logits_SV, ids_SN, logprobs_SN)
    own_SN = logits_SV.detach().log_softmax(-1).gather(1, best.indices)
    torch.testing.assert_close(kl_S.detach(), divergence(best.values, own_SN), atol=1e-5, rtol=1e-5)
    kl_S.sum().backward()
    assert logits_SV.grad is not None
    assert logits_SV.grad.isfinite().all()
    torch.testing.assert_close(
        logits_SV.grad[0], logits_SV.detach()[0].softmax(-1) - certain_V.exp(), atol=1e-6, rtol=0
    )
    everything = torch.arange(5).expand(2, 5)
    exact_S = (teacher_SV.exp() * (teacher_SV - logits_SV.detach().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(forward_kl(logits_SV, everything, teacher_SV).detach(), exact_S, atol=1e-5, rtol=1e-5)
