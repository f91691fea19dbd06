"""Losses a few states at a time: the values and gradients of all states at once, and what the control makes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from s2t_models.training import losses, per_state
from s2t_models.training.objectives.base import Outputs
from s2t_models.training.objectives.kd import KdObjective
from s2t_models.training_settings import DistilSettings

V, H = 7, 4


@pytest.fixture(params=[1, 2, 100], ids=lambda states: f"{states} states at a time")
def outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Outputs:
    """Five states through a soft-capped head, so that logits are no linear function of the hidden states."""
    monkeypatch.setattr(per_state, "LOGITS", request.param * V)
    generator = torch.Generator().manual_seed(5)
    head_VH = torch.randn(V, H, generator=generator, dtype=torch.float64)
    base_SH, tuned_SH = torch.randn(2, 5, H, generator=generator, dtype=torch.float64)
    return Outputs(
        base_SH, tuned_SH.requires_grad_(), torch.zeros(2, 0), lambda hidden: 3 * torch.tanh(hidden @ head_VH.T / 3), V
    )


def test_drift_and_its_gradient_are_those_of_all_states_at_once(outputs: Outputs) -> None:
    weight_S = torch.linspace(0.5, 2.0, 5, dtype=torch.float64)
    tuned = outputs.tuned_SH.detach().clone().requires_grad_()
    expected_S = losses.stability(outputs.text_logits(outputs.base_SH), outputs.text_logits(tuned))
    (expected_S * weight_S).sum().backward()
    drift_S = outputs.drift()
    (drift_S * weight_S).sum().backward()
    torch.testing.assert_close(drift_S, expected_S)
    torch.testing.assert_close(outputs.tuned_SH.grad, tuned.grad)


def test_kd_answers_where_labelled_and_stays_elsewhere(outputs: Outputs) -> None:
    tuned = outputs.tuned_SH.detach().clone().requires_grad_()
    labelled, tokens = [1, 3], [6, 2]
    logits_SV = outputs.text_logits(tuned)
    answer = sum(-(logits_SV[s][t] - logits_SV[s].exp().sum().log()) for s, t in zip(labelled, tokens, strict=True)) / 2
    drift_S = losses.stability(outputs.text_logits(outputs.base_SH), logits_SV)
    expected = answer + 2.5 * (drift_S[0] + drift_S[2] + drift_S[4]) / 3
    expected.backward()
    batch = SimpleNamespace(packed=SimpleNamespace(state_G=torch.tensor(labelled)), target_token_G=torch.tensor(tokens))
    terms = KdObjective(DistilSettings(kd_beta=2.5)).terms(cast(Any, batch), outputs)
    value = sum(term.weight * term.value for term in terms)
    value.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(outputs.tuned_SH.grad, tuned.grad)


def test_choices_are_those_of_the_logits(outputs: Outputs) -> None:
    state_G, candidates_GK = torch.tensor([4, 0, 2]), torch.tensor([[1, 5], [6, -1], [0, 3]])
    logits_GV = outputs.text_logits(outputs.tuned_SH)[state_G]
    preference_GK, token_G = outputs.text_choice(state_G, candidates_GK)
    torch.testing.assert_close(preference_GK, logits_GV.gather(1, candidates_GK.clamp(min=0)).float())
    assert token_G.tolist() == logits_GV.argmax(-1).tolist()
    surprisal_G = outputs.surprisal(state_G, token_G)
    torch.testing.assert_close(surprisal_G, F.cross_entropy(logits_GV, token_G, reduction="none"))


def test_no_states_give_an_empty_result_with_a_gradient(outputs: Outputs) -> None:
    none = torch.zeros(0, dtype=torch.long)
    outputs.surprisal(none, none).sum().backward()
    assert outputs.tuned_SH.grad is not None
    assert not outputs.tuned_SH.grad.any()
