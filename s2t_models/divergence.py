"""Divergence of the SLM's and the teacher's next-token distributions, the one function that labelling, calibration,
online triggers and analysis all use (section 4.1, E.1).

Axes: _T step, _N the SLM's top-N support.
"""

from __future__ import annotations

from typing import Literal

import torch

Tail = Literal["bucket", "renormalised"]


def divergence(slm_logprobs_TN: torch.Tensor, teacher_logprobs_TN: torch.Tensor, tail: Tail = "bucket") -> torch.Tensor:
    """KL(SLM || teacher) in nats per step, [T] float32, from both models' log-probabilities of the SLM's top N tokens.

    "bucket" puts the rest of each distribution into one more outcome, which can only lower the full-vocabulary KL and
    equals it at N = V. "renormalised" drops the rest and renormalises both, as the published code does.
    """
    # Masked rows come as -inf: clamped, their probability is still 0 and 0 times their log stays 0.
    p_TN = torch.as_tensor(slm_logprobs_TN).double().clamp_min(-1e4)
    q_TN = torch.as_tensor(teacher_logprobs_TN).double().clamp_min(-1e4)
    if tail == "renormalised":
        p_TN, q_TN = p_TN.log_softmax(-1), q_TN.log_softmax(-1)
        return (p_TN.exp() * (p_TN - q_TN)).sum(-1).float()
    inside_T = (p_TN.exp() * (p_TN - q_TN)).sum(-1)
    rest_p_T, rest_q_T = _rest(p_TN), _rest(q_TN)
    # Float32 inputs leave a rest of about 1e-7 where nothing remains: below that it is rounding, not probability.
    outside_T = torch.where(rest_p_T > 1e-6, rest_p_T * (rest_p_T / rest_q_T.clamp_min(1e-7)).log(), 0.0)
    return (inside_T + outside_T).clamp_min(0.0).float()


def _rest(logprobs_TN: torch.Tensor) -> torch.Tensor:
    return (1.0 - logprobs_TN.exp().sum(-1)).clamp(0.0, 1.0)
