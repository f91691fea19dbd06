"""What the labels of a collection have to be, from full forwards of both models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from s2t_models import loading
from s2t_models.recipe import Recipe
from s2t_models.reserved import reserved_rows


@torch.no_grad()
def assert_labels_equal_brute_force(rows: list[dict[str, Any]], recipe: Recipe) -> None:
    """KL, ranks and candidates against full forwards of both models in float64, text vocabulary only."""
    models = [loading.load_model(settings).double() for settings in (recipe.slm, recipe.teacher)]
    masked = list(reserved_rows(recipe))
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["output_ids"]])
        p_TV, q_TV = (model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1] for model in models)
        p_TV[:, masked] = q_TV[:, masked] = -torch.inf
        p_TV, q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
        top_TN = p_TV.argsort(-1, descending=True)[:, : recipe.divergence.support]
        kl_T = []
        for p_V, q_V, top_N in zip(p_TV.numpy(), q_TV.numpy(), top_TN.numpy(), strict=True):
            p = np.append(np.exp(p_V[top_N]), 1 - np.exp(p_V[top_N]).sum())
            q = np.append(np.exp(q_V[top_N]), 1 - np.exp(q_V[top_N]).sum())
            kl_T.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 1e-12))
        np.testing.assert_allclose(row["kl_T"], kl_T, rtol=1e-3, atol=1e-4)
        entropy_T = -(p_TV.exp() * p_TV.clamp_min(-1e9)).sum(-1)
        np.testing.assert_allclose(row["entropy_T"], entropy_T.numpy(), rtol=1e-3, atol=1e-4)
        assert row["teacher_argmax_T"] == q_TV.argmax(-1).tolist()
        place_TV = p_TV.argsort(-1, descending=True).argsort(-1)
        rank_T = place_TV.gather(-1, q_TV.argmax(-1, keepdim=True)).squeeze(-1)
        assert row["teacher_rank_T"] == rank_T.clamp_max(recipe.divergence.support).tolist()
        assert row["kept"]
        for step in row["kept"]:
            candidates_K = step["candidates_K"]
            assert len(set(candidates_K)) == recipe.collect.k
            assert not set(candidates_K) & set(masked)
            np.testing.assert_allclose(step["slm_logprobs_K"], p_TV[step["step"], candidates_K], rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(
                step["teacher_logprobs_K"], q_TV[step["step"], candidates_K], rtol=1e-3, atol=1e-3
            )
