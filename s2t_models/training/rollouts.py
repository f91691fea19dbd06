"""Texts that the tuned model writes to the training prompts while it is trained.

They are made by an engine of the weights as they are at the first step of a window, for all steps of the window at
once, so that the engine has a batch. The weights of the window are part of a checkpoint, and the noise of a text
depends on its step and prompt alone. So a training that goes on in the midst of a window writes the same texts again,
also with another number of workers.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from s2t_models.engines.contract import Draft, Sampling
from s2t_models.engines.load import card_of
from s2t_models.engines.torch import families
from s2t_models.engines.torch.engine import TorchEngine
from s2t_models.hosting import Hosted
from s2t_models.recipe import Recipe
from s2t_models.reserved import masked_rows
from s2t_models.training.batches import Trajectory
from s2t_models.training.selector import Selector


class Rollouts:
    """The texts of each step's prompts. `prompts_of` gives the trajectories of a step on this worker, whose prompts are
    answered."""

    def __init__(self, recipe: Recipe, selector: Selector, prompts_of: Callable[[int], Sequence[Trajectory]]) -> None:
        self._recipe, self._selector, self._prompts_of = recipe, selector, prompts_of
        #: What was trained at the first step of the window.
        self.weights: dict[str, torch.Tensor] = {}
        self._texts: dict[int, list[Trajectory]] = {}

    def of(self, step: int) -> list[Trajectory]:
        """The texts of a step, longest first, without labels."""
        window = self._recipe.distil.tsd_kd.refresh
        if step % window == 0:
            self.resume({name: value.clone() for name, value in self._selector.trained().items()})
        if step not in self._texts:
            end = min(step - step % window + window, self._recipe.distil.steps)
            self._texts = self._write({at: self._prompts_of(at) for at in range(step, max(end, step + 1))})
        return self._texts[step]

    def resume(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Go on in the window that began with these weights."""
        self.weights, self._texts = dict(weights), {}

    def _write(self, prompts: Mapping[int, Sequence[Trajectory]]) -> dict[int, list[Trajectory]]:
        asked = [(step, item) for step, items in prompts.items() for item in items]
        tuned = copy.deepcopy(self._selector)
        tuned.load_trained(self.weights)
        model = tuned.merge().eval()
        settings = self._recipe.slm
        hosted = Hosted("slm", settings, masked_rows(self._recipe))
        context = settings.context or families.default_context(model)
        card = card_of(hosted, settings, (), int(model.config.vocab_size), context)
        engine = TorchEngine(model, card, settings.slots)
        try:
            drafts = asyncio.run(self._answers(engine, asked, context))
        finally:
            engine.close()
            del engine, model, tuned
            gc.unfreeze()  # what an engine keeps out of collections would be there for good
            gc.collect()
        texts: dict[int, list[Trajectory]] = {step: [] for step in prompts}
        for (step, item), draft in zip(asked, drafts, strict=True):
            texts[step].append(_unlabelled(item, draft.ids))
        return {step: sorted(own, key=lambda text: -len(text.tree.tokens)) for step, own in texts.items()}

    async def _answers(self, engine: TorchEngine, asked: Sequence[tuple[int, Trajectory]], context: int) -> list[Draft]:
        limit, temperature = self._recipe.collect.max_new_tokens, self._recipe.distil.tsd_kd.temperature

        def answer(step: int, item: Trajectory) -> Sampling:
            room = min(limit, context - item.tree.prompt)
            return Sampling(room, temperature, seed=_seed(self._recipe.seed, step, item.uid))

        return list(
            await asyncio.gather(
                *(
                    engine.generate(item.tree.tokens[: item.tree.prompt].tolist(), answer(step, item))
                    for step, item in asked
                )
            )
        )


def _seed(seed: int, step: int, uid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{uid}".encode()).digest()[:4], "big")


def _unlabelled(item: Trajectory, ids: Sequence[int]) -> Trajectory:
    """Another answer to the same prompt, of which nothing is known yet."""
    prompt = item.tree.prompt
    unknown_T = np.full(len(ids), np.nan, dtype=np.float32)
    bare = item.with_groups(np.zeros(len(item.by_kl_G), dtype=bool))
    tokens = np.concatenate([item.tree.tokens[:prompt], np.array(ids, dtype=np.int64)])
    return replace(bare, tree=replace(bare.tree, tokens=tokens), kl_T=unknown_T, entropy_T=unknown_T)
