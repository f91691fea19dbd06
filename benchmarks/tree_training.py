"""Selector training under a tree mask against a prefix copy per candidate, both sides in one run.

    python -m benchmarks.tree_training
    python -m benchmarks.tree_training --hidden 512 --layers 8 --groups 20 --rounds 3

Both sides score the same labelled steps with the same selector (the embedded SLM, or a random Qwen2 of a given size):
the tree side in one forward over the trajectory and all its leaves, the copy side in one batch of K unpadded rows a
step, which is what scoring is without the mask. Backward is that of the selection loss (Eq. 7). Times are this
process's CPU seconds with one thread, or wall seconds on a GPU, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from s2t_models.loading import load_model
from s2t_models.settings import ModelSettings
from s2t_models.training.selector import Selector
from s2t_models.training.tree import Tree, pack
from s2t_models.training_settings import LoraSettings


def main(argv: list[str] | None = None) -> None:
    settings = _parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(settings).to(device)
    vocabulary, parameters = model.config.vocab_size - 16, sum(value.numel() for value in model.parameters())
    selector = Selector(model, range(vocabulary, vocabulary + 16), LoraSettings(rank=32, alpha=64, dropout=0.0)).to(
        device
    )
    rng = np.random.default_rng(0)
    steps = np.sort(rng.choice(settings.output, settings.groups, replace=False))
    tree = Tree(
        tokens=rng.integers(0, vocabulary, settings.prompt + settings.output),
        prompt=settings.prompt,
        prefixes_G=settings.prompt + steps,
        candidates_GK=rng.integers(0, vocabulary, (settings.groups, settings.k)),
    )
    target_G = torch.from_numpy(rng.integers(0, settings.k, settings.groups)).to(device)

    def by_tree() -> torch.Tensor:
        packed = pack([tree]).to(device)
        return selector.scores(packed.leaves(selector(**packed.inputs())))

    def copies() -> list[torch.Tensor]:
        rows = []
        for prefix, candidates_K in zip(tree.prefixes_G, tree.candidates_GK, strict=True):
            row_KN = np.concatenate([np.tile(tree.tokens[:prefix], (settings.k, 1)), candidates_K[:, None]], axis=1)
            rows.append(torch.from_numpy(row_KN).to(device))
        return rows

    def loss(scores_GK: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores_GK / 0.1, targets, reduction="sum")

    def tree_forward() -> None:
        with torch.no_grad():
            by_tree()

    def copy_forward() -> None:
        with torch.no_grad():
            for row_KN in copies():
                selector.scores(selector(input_ids=row_KN)[:, -1])

    def tree_both() -> None:
        loss(by_tree(), target_G).backward()

    def copy_both() -> None:
        for group, row_KN in enumerate(copies()):
            loss(selector.scores(selector(input_ids=row_KN)[:, -1])[None], target_G[group : group + 1]).backward()

    def gradients(run: Callable[[], None]) -> dict[str, torch.Tensor]:
        selector.zero_grad()
        run()
        return {name: value.grad.clone() for name, value in selector.named_parameters() if value.grad is not None}

    with torch.no_grad():
        apart = [selector.scores(selector(input_ids=row_KN)[:, -1]) for row_KN in copies()]
        difference = (by_tree() - torch.stack(apart)).abs().max().item()
    ours, theirs = gradients(tree_both), gradients(copy_both)
    largest = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    scale = max(value.abs().max().item() for value in theirs.values())

    print(
        f"{parameters / 1e6:.2f}M parameters on {device}; trajectory of "
        f"{settings.prompt} + {settings.output} tokens, {settings.groups} labelled steps x {settings.k} candidates; "
        f"{settings.rounds} rounds"
    )
    print(f"{'':20}{'prefix copies':>16}{'tree mask':>14}{'ratio':>9}")
    for name, sides in {"forward": (copy_forward, tree_forward), "forward + backward": (copy_both, tree_both)}.items():
        slow, fast = _medians(sides, settings.rounds, device)
        print(f"{name:20}{1000 * slow:13.1f} ms{1000 * fast:11.1f} ms{slow / fast:8.1f}x")
    print(
        f"max |score difference| {difference:.1e}; max |gradient difference| {largest:.1e} "
        f"(largest gradient {scale:.1e})"
    )


def _medians(
    sides: tuple[Callable[[], None], Callable[[], None]], rounds: int, device: torch.device
) -> tuple[float, float]:
    """Median seconds of each side, taken in turns after one round that warms up."""
    taken: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for run, seconds in zip(sides, taken, strict=True):
            begin = _clock(device)
            run()
            if round_:
                seconds.append(_clock(device) - begin)
    return statistics.median(taken[0]), statistics.median(taken[1])


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _model(settings: argparse.Namespace) -> torch.nn.Module:
    if settings.hidden is None:
        return load_model(ModelSettings(path="embedded:slm", dtype="float32", device="cpu"))
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = max(settings.hidden // 64, 1)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 5 // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tree_training", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--prompt", type=int, default=60, help="prompt tokens")
    parser.add_argument("--output", type=int, default=140, help="output tokens")
    parser.add_argument("--groups", type=int, default=14, help="labelled steps (10%% of the output)")
    parser.add_argument("--k", type=int, default=16, help="candidates a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, help="a random Qwen2 this wide in place of the embedded SLM")
    parser.add_argument("--layers", type=int, default=8, help="its layers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
