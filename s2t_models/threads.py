"""How many threads a process computes with: as many as the recipe gives it CPUs, not what it happens to inherit."""

from __future__ import annotations


def use_threads(num_cpus: float) -> None:
    """Let torch use `num_cpus` threads in this process, one at the least, whatever OMP_NUM_THREADS says."""
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))
