"""The card or machine that a recipe is held against."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from s2t_models.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """`memory` in bytes, `flops` in half precision and `bandwidth` of the memory, both at their peak and a second;
    `compute` and `reading` are the shares of them that plain PyTorch is taken to reach, `stepwise` that of `flops`
    where it writes or trains: few tokens are computed at once, and much else is done between. `layer` are the seconds
    that starting a layer's kernels takes at least, `entry` those that an entry of the vocabulary takes where a step's
    distribution is drawn from and recorded, or trained on, `overhead` the bytes of a process that holds nothing yet."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    compute: float = 0.4
    stepwise: float = 0.4
    reading: float = 0.6
    layer: float = 0.8e-3
    entry: float = 0.0
    overhead: float = 1.0 * GIB
    is_gpu: bool = True

    def seconds(self, flops: float, read: float = 0.0, layers: int = 0, stepwise: bool = False) -> float:
        """Of arithmetic and of reading memory, one after the other, and of starting `layers` layers."""
        share = self.stepwise if stepwise else self.compute
        work = flops / (self.flops * share) + read / (self.bandwidth * self.reading)
        return max(work, layers * self.layer)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.memory / GIB:.1f} GiB, {self.flops / 1e12:g} TFLOP/s x {self.compute:g}, "
            f"{self.bandwidth / 1e9:g} GB/s x {self.reading:g}"
        )


def _cpu() -> Card:
    """This machine, with what two cores with bfloat16 instructions were measured at."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Card("cpu", memory, 0.33e12, 15e9, 1.0, 0.6, 1.0, 0.0, 20e-9, 0.6 * GIB, is_gpu=False)


#: Vendors' figures: dense half precision, and the memory that the driver reports.
CARDS = {
    "h200": Card("h200", 140.4 * GIB, 989e12, 4.8e12),
    "h100": Card("h100", 79.6 * GIB, 989e12, 3.35e12),
    "a100": Card("a100", 79.3 * GIB, 312e12, 2.04e12),
    "l40s": Card("l40s", 45.0 * GIB, 362e12, 0.864e12),
    "cpu": _cpu(),
}


def card(name: str, memory: float | None, tflops: float | None, bandwidth: float | None) -> Card:
    """A card by name, with figures of one's own where given: GiB, TFLOP/s, GB/s. Raises UserError."""
    if name not in CARDS:
        raise UserError(
            f"no card {name!r}; there are: {', '.join(CARDS)} (--memory, --tflops and --bandwidth change one)"
        )
    if any(value is not None and value <= 0 for value in (memory, tflops, bandwidth)):
        raise UserError("--memory, --tflops and --bandwidth are above 0")
    chosen = CARDS[name]
    return replace(
        chosen,
        memory=chosen.memory if memory is None else memory * GIB,
        flops=chosen.flops if tflops is None else tflops * 1e12,
        bandwidth=chosen.bandwidth if bandwidth is None else bandwidth * 1e9,
    )
