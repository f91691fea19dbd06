"""`kd-at-triggers`: at an artifact's triggered steps another model's text logits choose, and nothing else changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from reference_engine import encode, tiny_pair, torch_engines

from benchmarks.label_efficiency.choosing import ChosenBy
from s2t_models.engines.contract import Selecting, Selection
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.policies.local import Local
from s2t_models.settings import CandidateSettings

SELECTION = Selection(threshold=0.0, candidates=CandidateSettings(k=4, method="top_k"))


def test_the_chooser_decides_among_the_candidates_of_triggered_steps_alone():
    torch.set_num_threads(1)
    unlike = Counter[str]()
    with torch_engines(tiny_pair()) as engines:
        for text in ("Ada has 12 ", "8+5=", "then 4 more "):
            asyncio.run(check(engines, encode(text), unlike))
    assert unlike["selector"]
    assert unlike["writer"]


async def check(engines: Engines, prompt: list[int], unlike: Counter[str]) -> None:
    """Every token against calls of its own: to the chooser at triggered steps, and elsewhere to the writer."""
    writer, chooser = engines["s2t-local"], engines["teacher"]
    chosen = replace(engines, by_name=engines.by_name | {"s2t-local": ChosenBy(writer, chooser)})
    decoded = await gather(Local("s2t-local-w0", SELECTION).decode(chosen, Request(prompt, 24)))
    ids, decisions = decoded.ids, {decision.step: decision for decision in decoded.decisions}
    greedy_T = (await writer.score(prompt + ids[:-1], len(prompt), np.array(ids)[:, None])).argmax_T
    assert 0 < len(decisions) < len(ids)
    for step, token in enumerate(ids):
        if step not in decisions:
            assert token == greedy_T[step]
            continue
        state, candidates_K = prompt + ids[:step], decisions[step].candidates_K
        logprobs_K = (await chooser.score(state, len(state), np.array([candidates_K]))).logprobs_TN[0]
        assert token == candidates_K[int(logprobs_K.argmax())]
        unlike["writer"] += token != greedy_T[step]
        assert isinstance(writer, Selecting)
        unlike["selector"] += token != candidates_K[int((await writer.select(state, candidates_K)).scores_K.argmax())]
    assert decoded.usage["s2t-local"].leaves == 0
