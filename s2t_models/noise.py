"""Noise that depends on (seed, step) alone, so that the same seed gives the same text whatever the batch, the replica
or the load. A counter-based generator (Philox) keyed by seed and step: no state to carry, none to get out of order."""

from __future__ import annotations

import numpy as np

#: What the noise is for. Distinct streams of one (seed, step) are independent.
STREAMS = {"token": 0, "candidates": 1, "trigger": 2, "multiplex": 3}


def uniforms(seed: int, step: int, count: int, stream: str = "token") -> np.ndarray:
    """`count` independent uniforms in [0, 1), float64, of one step of one request."""
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, 0x5325], dtype=np.uint64)
    counter = np.array([0, 0, STREAMS[stream], step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key)).random(count)
