"""An engine that sleeps for as long as a real one was measured to compute, and makes its answers up.

What is left of a job is all that scales or does not: Ray, Serve, files, and the project's own code. The engine comes
into the workers of a job by Ray's `worker_process_setup_hook`, which puts it beside the real ones (`runtime_env`).

Axes: _T step, _N support.
"""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from s2t_models import loading
from s2t_models.engines.contract import (
    Counted,
    Draft,
    Finish,
    ModelCard,
    Sampling,
    Scores,
    Support,
    Tell,
    Usage,
    Written,
)
from s2t_models.engines.load import ENGINES, EngineKind, card_of
from s2t_models.hosting import Hosted

NAME = "sleeping"
#: The variable that tells a job's workers what `runtime_env` was given.
VARIABLE = "S2T_SLEEPING"
#: One step in so many is one where the teacher's order is not the SLM's.
TURNED = 20


@dataclass(frozen=True)
class Pace:
    """Seconds of a decode step of all slots together, and of a token that is read."""

    step_s: float
    read_s: float


#: Qwen2.5-Coder-0.5B and -1.5B in bfloat16 on the torch engine and two cores: 100 tokens a second with 16 at once; 0.61
#: seconds for 64 tokens. What was not measured follows from the parameters: both are bound by reading weights.
PACES = {"slm": Pace(0.16, 0.0032), "teacher": Pace(0.48, 0.0095)}


def runtime_env(speeds: Mapping[str, float], answer: int) -> dict[str, Any]:
    """Ray's runtime environment of a job whose engines sleep: each `speeds` times as fast as was measured. Answers have
    half of `answer` tokens to all of them."""
    told = json.dumps({"speeds": speeds, "answer": answer})
    return {"worker_process_setup_hook": f"{__name__}.register", "env_vars": {VARIABLE: told}}


def register() -> None:
    """Put the engine beside the others of this process."""
    ENGINES[NAME] = EngineKind(__name__)


def load(hosted: Hosted) -> SleepingEngine:
    told = json.loads(os.environ[VARIABLE])
    return SleepingEngine(hosted, told["speeds"][hosted.name], told["answer"])


class SleepingEngine:
    """The core of the contract. A draft sleeps its steps, a scoring the tokens it reads, one scoring after the other.
    What it writes depends on the prefix and the step alone."""

    def __init__(self, hosted: Hosted, speed: float, answer: int) -> None:
        settings = hosted.settings
        config = loading.load_config(settings)
        self._card = card_of(hosted, settings, (), config.vocab_size, settings.context or 1024)
        self._pace, self._speed, self._answer = PACES[hosted.name], speed, answer
        self._places, self._reading = asyncio.Semaphore(settings.slots), asyncio.Lock()
        self._written = self._read = self._running = 0

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        prompt = prefix[: len(prefix) - sampling.first_step]
        rng = np.random.default_rng(zlib.crc32(np.asarray(prompt, np.int32).tobytes()))
        whole = rng.integers(self._first, self._first + 256, rng.integers(self._answer // 2, self._answer))
        left = whole[sampling.first_step :].tolist()[: sampling.max_tokens]
        ids = left if len(left) == sampling.max_tokens else [*left, self._card.end_ids[0]]
        async with self._places:
            await self._sleep(len(ids) * self._pace.step_s)
        self._written += len(ids)
        support = self._support(ids, sampling.support) if sampling.support else None
        if tell is not None:
            tell(Written(ids, support))
        finish: Finish = "end" if ids[-1] in self._card.end_ids else "length"
        return Draft(ids, finish, Usage(decode=len(ids), forwards=len(ids)), support)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        rows, width = ids_TN.shape
        async with self._reading:
            await self._sleep(rows * self._pace.read_s)
        self._read += rows
        turned_T = np.arange(start, start + rows) % TURNED == 0
        curve_N = _curve(width)
        logprobs_TN = np.where(turned_T[:, None], curve_N[::-1], curve_N)
        argmax_T = ids_TN[np.arange(rows), np.where(turned_T, width - 1, 0)]
        asked = self._support(argmax_T.tolist(), support) if support else None
        return Scores(logprobs_TN, argmax_T, Usage(prefill=rows, forwards=1), asked)

    @property
    def counted(self) -> Counted:
        return Counted(self._written, self._read, running=self._running)

    def close(self) -> None:
        """There is nothing to free."""

    async def _sleep(self, seconds: float) -> None:
        self._running += 1
        await asyncio.sleep(seconds / self._speed)
        self._running -= 1

    @property
    def _first(self) -> int:
        """The first of the ids that are written."""
        return max(self._card.end_ids) + 1

    def _support(self, ids: list[int], width: int) -> Support:
        """The tokens, and those after them in the vocabulary."""
        ids_TN = (np.asarray(ids)[:, None] + np.arange(width)) % self._card.vocabulary
        logprobs_TN = np.tile(_curve(width), (len(ids), 1))
        return Support(ids_TN, logprobs_TN, np.full(len(ids), 1.0, np.float32))


def _curve(width: int) -> np.ndarray:
    """Log-probabilities that fall by a half from one to the next, [N]."""
    return (-np.log(2) * np.arange(1, width + 1)).astype(np.float32)
