"""Records that tests need and nobody made."""

from __future__ import annotations

from typing import Any

from s2t_models.calibration import Calibration
from s2t_models.provenance import Provenance


def provenance(**changes: Any) -> Provenance:
    """Of a training that never was."""
    record = {
        "objective": "selector",
        "recipe": "abc",
        "base_weights": "base",
        "teacher_weights": "teacher",
        "tokenizer": "tokenizer",
        "divergence": "KL(SLM || teacher), top 64, bucket",
        "shards": {"training": "def"},
        "rows": {},
        "seeds": {"training": 0},
        "settings": {"distil.steps": 20},
    }
    return Provenance(**record | changes)


def calibration(**changes: Any) -> Calibration:
    """Of a collection that never was."""
    record = {
        "kl": {0.1: 0.25},
        "entropy": {0.1: 0.5},
        "steps": 100,
        "rows": (),
        "task": "embedded-calibration",
        "slm": "base",
        "teacher": "teacher",
        "tokenizer": "tokenizer",
        "divergence": "KL(SLM || teacher), top 64, bucket",
    }
    return Calibration(**record | changes)
