"""The trigger head: what it learns, how its threshold is set, and the AUC."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.training_memory import made_up_trajectories
from s2t_models.calibration import calibrate
from s2t_models.loading import load_model
from s2t_models.recipe import load_recipe
from s2t_models.training.batches import Trajectory
from s2t_models.training.products import drawn, over_steps
from s2t_models.training.trigger_head import auc, train_head
from s2t_models.training_settings import TriggerHeadSettings

SETTINGS = TriggerHeadSettings(hidden=32, epochs=60, learning_rate=3e-2)


def samples() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """4,000 steps of 100 trajectories; the positives, one in ten, lie outside a ball (no linear rule finds them)."""
    hidden_MH = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    norm_M = hidden_MH.norm(dim=1)
    return hidden_MH, norm_M >= norm_M.quantile(0.9), torch.arange(100).repeat_interleave(40)


def test_the_head_learns_what_a_linear_rule_cannot_and_training_is_reproducible():
    hidden_MH, positive_M, trajectory_M = samples()
    state = torch.get_rng_state()
    head, figures = train_head(hidden_MH, positive_M, trajectory_M, SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    assert figures["auc"] > 0.95
    again, _ = train_head(hidden_MH, positive_M, trajectory_M, SETTINGS)
    with torch.no_grad():
        assert torch.equal(head(hidden_MH), again(hidden_MH))
    assert not head.training


def test_the_held_out_share_is_one_of_trajectories():
    """Labels that only a trajectory's own samples give away cannot be learned from other trajectories."""
    generator = torch.Generator().manual_seed(1)
    marks = torch.randn(60, 32, generator=generator)
    positive = torch.rand(60, generator=generator) < 0.5
    trajectory_M = torch.arange(60).repeat_interleave(30)
    hidden_MH = marks[trajectory_M] + 0.01 * torch.randn(1800, 32, generator=generator)
    _, figures = train_head(
        hidden_MH, positive[trajectory_M], trajectory_M, TriggerHeadSettings(epochs=1, validation=0.5)
    )
    assert figures["auc"] < 0.8


def test_one_kind_of_label_is_refused():
    hidden_MH, positive_M, trajectory_M = samples()
    with pytest.raises(ValueError, match="no positive or no negative"):
        train_head(hidden_MH, torch.zeros_like(positive_M), trajectory_M, SETTINGS)


def test_calibrated_thresholds_trigger_the_budgets_share():
    values = np.random.default_rng(0).normal(size=3000)
    budgets = (0.01, 0.02, 0.05, 0.1, 0.2, 0.37, 1.0)
    thresholds = calibrate(values, budgets)
    for tau in budgets:
        assert (values >= thresholds[tau]).sum() == round(tau * 3000)
        assert thresholds[tau] in values


def test_ties_at_the_threshold_all_trigger_and_one_step_always_does():
    assert calibrate([3.0, 2.0, 2.0, 2.0, 1.0], [0.4]) == {0.4: 2.0}
    assert calibrate([1.0, 5.0], [0.01]) == {0.01: 5.0}
    with pytest.raises(ValueError, match="at least one step"):
        calibrate([], [0.1])


def test_auc_equals_scikit_learns_with_ties():
    rng = np.random.default_rng(2)
    values = rng.integers(0, 12, 500).astype(float)
    positive = rng.random(500) < values / 15
    assert auc(values, positive) == pytest.approx(roc_auc_score(positive, values), abs=1e-12)


def trajectories() -> list[Trajectory]:
    """Of 3 to 12 steps."""
    shape = {"groups": 2, "k": 4, "ids": 300, "trajectories": 0}
    return [made_up_trajectories(argparse.Namespace(tokens=tokens, **shape))[0] for tokens in range(5, 19)]


def test_steps_are_drawn_whole_trajectories_at_a_time_where_there_are_too_many():
    items = trajectories()
    steps = [len(item.kl_T) for item in items]
    assert drawn(items, sum(steps), 0) is items
    some, others = drawn(items, 50, 0), drawn(items, 50, 1)
    assert 50 - max(steps) < sum(len(item.kl_T) for item in some) <= 50
    assert [len(item.kl_T) for item in some] == [len(item.kl_T) for item in drawn(items, 50, 0)]
    assert [len(item.kl_T) for item in some] != [len(item.kl_T) for item in others]
    assert len(drawn(items, 1, 0)) == 2


@torch.no_grad()
def test_what_is_computed_of_each_step_is_that_of_its_own_forward():
    model, items = load_model(load_recipe("embedded").slm), trajectories()
    expected_MH = []
    for item in items:
        out = model(torch.from_numpy(item.tree.tokens)[None], output_hidden_states=True, use_cache=False)
        expected_MH += list(out.hidden_states[-1][0, item.tree.prompt - 1 : -1])
    hidden_MH = over_steps(model, items, 40)
    assert torch.allclose(hidden_MH, torch.stack(expected_MH), atol=1e-4)
    assert torch.equal(over_steps(model, items, 40, lambda states_MH: states_MH.sum(-1)), hidden_MH.sum(-1))
