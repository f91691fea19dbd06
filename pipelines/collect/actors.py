"""The two kinds of actor of a collection: the SLM rolls prompts out, the teacher labels what came of them. Where the
teacher writes (`collect.writer`), the two change places; where S2T does, see `rescued`.

One row in is one row out: a prompt that cannot be used, or whose call fails, becomes a row with an `error`
and costs no other row. All rows of a batch are called at once, so that the engine batches them. The actors
are plain classes and know nothing of Ray, files or which rows of the collection there are.

Axes: _T step, _N the writer's top-N support, _K candidate.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from pipelines.collect.schemas import FAILED, LABELLED, ROLLOUT
from s2t_models import chat, loading
from s2t_models.candidates import Method
from s2t_models.divergence import divergence
from s2t_models.engines.contract import ContextOverflow, Engine, EngineDied, Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import Hosted
from s2t_models.noise import uniforms
from s2t_models.recipe import Recipe
from s2t_models.threads import use_threads
from serving.written import keep_posted

Row = dict[str, Any]


class UnusablePrompt(ValueError):
    """A prompt that cannot be rolled out; the message is the row's error."""


class Rollouts:
    """Rollouts of a batch of prompts. `hosted` is the model that writes; the `board` is told how many tokens it has
    written."""

    #: The rows that come of the prompts.
    made: ClassVar[pa.Schema] = ROLLOUT

    def __init__(self, recipe: Recipe, hosted: Hosted, board: Any = None) -> None:
        use_threads(recipe.collect.pool(recipe.collect.drafter).num_cpus)
        self.tokenizer = loading.load_tokenizer(hosted.settings)
        self.engine: Engine = load(hosted)
        keep_posted(self.engine, hosted.name, board)
        self.recipe = recipe
        self.loop = asyncio.new_event_loop()

    def __call__(self, prompts: pa.Table) -> pa.Table:
        rows = self.loop.run_until_complete(_each(prompts.to_pylist(), self.roll_out))
        return pa.Table.from_pylist(rows, self.made)

    async def roll_out(self, row: Row) -> Row:
        messages = json.loads(row["messages"])
        if not any(message["content"].strip() for message in messages):
            raise UnusablePrompt("empty prompt: no message has any text")
        prompt = chat.render(self.tokenizer, messages)
        prompt_ids = chat.encode(self.tokenizer, prompt)
        return {"prompt": prompt, "prompt_ids": prompt_ids} | await self.write(prompt_ids, row)

    async def write(self, prompt_ids: list[int], row: Row) -> Row:
        """The columns of what is written behind the prompt."""
        collect = self.recipe.collect
        sampling = Sampling(
            max_tokens=collect.max_new_tokens,
            temperature=row["temperature"],
            top_p=collect.top_p if row["temperature"] else 1.0,
            seed=row["seed"],
            support=self.recipe.divergence.support,
        )
        draft = await self.engine.generate(prompt_ids, sampling)
        support = draft.supported
        return {
            "output_ids": draft.ids,
            "finish": draft.finish,
            "entropy_T": support.entropy_T,
            "support_ids": support.ids_TN.ravel(),
            "support_logprobs": support.logprobs_TN.ravel(),
        }


class Labels:
    """The other model's view of a batch of rollouts: one forward a trajectory, and every step's candidates.

    Which steps are worth keeping is decided over the whole collection, once all of it is there (see
    `publish`). `hosted` is the model that reads: the teacher, but where the teacher wrote."""

    def __init__(self, recipe: Recipe, hosted: Hosted) -> None:
        use_threads(recipe.collect.pool(recipe.collect.reader).num_cpus)
        self.engine: Engine = load(hosted)
        keep_posted(self.engine, hosted.name)
        self.recipe = recipe
        self.loop = asyncio.new_event_loop()

    def __call__(self, rollouts: pa.Table) -> pa.Table:
        support = {name: rollouts[name] for name in ("support_ids", "support_logprobs")}
        rows = rollouts.drop_columns(list(support)).to_pylist()
        for name, column in support.items():  # as arrays: they are most of what a rollout weighs
            for row, scalar in zip(rows, column, strict=True):
                row[name] = scalar.values.to_numpy() if scalar.is_valid else None
        return pa.Table.from_pylist(self.loop.run_until_complete(_each(rows, self.label)), LABELLED)

    async def label(self, row: Row) -> Row:
        steps = len(row["output_ids"])
        ids_TN = row["support_ids"].reshape(steps, -1)
        written_TN = row["support_logprobs"].reshape(steps, -1)
        by_slm = self.recipe.collect.drafter == "slm"
        tokens, start = row["prompt_ids"] + row["output_ids"], len(row["prompt_ids"])
        scores = await self.engine.score(tokens, start, ids_TN, 0 if by_slm else ids_TN.shape[1])
        if by_slm:
            argmax_T, rank_T = scores.argmax_T, teacher_rank(ids_TN, scores.argmax_T)
        else:
            assert scores.support is not None
            argmax_T, rank_T = ids_TN[:, 0], teacher_rank(scores.support.ids_TN, ids_TN[:, 0])
        return {
            "teacher_read": len(tokens) if by_slm else start,
            "teacher_argmax_T": argmax_T,
            "teacher_rank_T": rank_T,
            **labels(ids_TN, written_TN, scores.logprobs_TN, self.recipe, row["seed"]),
        }


def labels(ids_TN: np.ndarray, drafted_TN: np.ndarray, read_TN: np.ndarray, recipe: Recipe, seed: int) -> Row:
    """The columns `kl_T` and `kept`, of every step: `ids_TN` are the support of the model that rolled out,
    `drafted_TN` its log-probabilities of them, and `read_TN` those of the model that read."""
    collect = recipe.collect
    kl_T = divergence(torch.tensor(drafted_TN), torch.tensor(read_TN), recipe.divergence.tail)
    slm_TN, teacher_TN = (drafted_TN, read_TN) if collect.drafter == "slm" else (read_TN, drafted_TN)
    chosen_TK = propose_steps(drafted_TN, collect.k, collect.method, seed)
    candidates = [np.take_along_axis(of_TN, chosen_TK, -1) for of_TN in (ids_TN, slm_TN, teacher_TN)]
    kept = [
        {"step": step, "by_kl": False, "candidates_K": ids_K, "slm_logprobs_K": slm_K, "teacher_logprobs_K": teacher_K}
        for step, (ids_K, slm_K, teacher_K) in enumerate(zip(*candidates, strict=True))
    ]
    return {"kl_T": kl_T.numpy(), "kept": kept}


def propose_steps(logprobs_TN: np.ndarray, k: int, method: Method, seed: int) -> np.ndarray:
    """Indices into the support of every step's candidates, best first, [T, min(K, N)] (D.2): what `candidates.propose`
    draws from, for a whole trajectory at once and with noise of its own. The top K of log p plus Gumbel noise are K
    draws without replacement."""
    steps, support = logprobs_TN.shape
    if method == "top_k":
        return np.tile(np.arange(min(k, support)), (steps, 1))
    uniform_TN = uniforms(seed, 0, steps * support, "candidates").reshape(steps, support)
    keys_TN = logprobs_TN - np.log(-np.log(np.maximum(uniform_TN, np.finfo(float).tiny)))
    return np.sort(np.argsort(-keys_TN, axis=-1)[:, :k], axis=-1)


def teacher_rank(ids_TN: np.ndarray, argmax_T: np.ndarray) -> np.ndarray:
    """0-based rank of the teacher's argmax in the SLM's order, [T]; N where it is not in the support."""
    hit_TN = ids_TN == argmax_T[:, None]
    return np.where(hit_TN.any(-1), hit_TN.argmax(-1), ids_TN.shape[1])


async def _each(rows: list[Row], work: Callable[[Row], Awaitable[Row]]) -> list[Row]:
    """All rows at once. A row that fails keeps what it had and says why; a row that had failed before is
    passed on."""

    async def one(row: Row) -> Row:
        if row.get("error"):
            return row
        try:
            return row | await work(row)
        except (UnusablePrompt, chat.ChatError) as error:
            reason = str(error)
        except ContextOverflow as error:
            reason = f"too long: {error}"
        except EngineDied:
            os._exit(1)  # as if it had died with its engine: Ray starts the actor again, and the batch with it
        except Exception as error:  # one row's fault is one row's error, counted and named at the end
            reason = f"{FAILED}: {type(error).__name__}: {' '.join(str(error).split())}"
        return row | {"entropy_T": None, "error": reason}

    return list(await asyncio.gather(*(one(row) for row in rows)))
