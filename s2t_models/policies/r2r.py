"""R2R: a router on the SLM's own outputs decides which of its tokens the teacher replaces.

It is Takeover with another trigger: the router (see `s2t_models.router`) reads the whole draft in one SLM forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from s2t_models.engines.contract import Usage
from s2t_models.policies.base import Engines
from s2t_models.policies.triggers import Drafted, Judgement

if TYPE_CHECKING:
    from s2t_models.router import Router


@lru_cache(maxsize=4)
def _load(folder: Path) -> Router:
    from s2t_models.router import load_router

    return load_router(folder)


@dataclass(frozen=True)
class RouterTrigger:
    """The router's probability of a divergent token at or above its threshold (`threshold` None: the one saved with it)."""

    folder: Path
    threshold: float | None = None

    async def judge(self, engines: Engines, drafted: Drafted) -> Judgement:
        router = _load(self.folder)
        start = len(drafted.prefix) + drafted.first
        inputs_TF = await engines["slm"].features(drafted.prefix + drafted.draft.ids, start, router.settings.support)
        values_T = router.probabilities(inputs_TF)
        threshold = router.settings.threshold if self.threshold is None else self.threshold
        # Reading the draft is one more forward over its tokens; `features` itself reports no usage.
        return Judgement(values_T, values_T >= threshold, usage={"slm": Usage(prefill=len(inputs_TF), forwards=1)})
