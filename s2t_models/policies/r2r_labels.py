"""R2R's labels: which of the SLM's tokens would have changed what the teacher goes on to say.

The teacher answers; the SLM is prefilled over that text; where its argmax differs, the teacher goes on from the SLM's
token to the end of the sentence, and a judge says whether the meaning diverged. A judge for real pairs is a model's 0/1
(`ask`); for generated arithmetic the equations speak for themselves (`numbers_differ`). Axes: _T step, _F feature.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from s2t_models import chat
from s2t_models.engines.contract import Engine, Sampling
from s2t_models.policies.base import Engines
from s2t_models.policies.r2r import FeatureEngine
from s2t_models.policies.segments import generate_segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: (text before, the teacher's sentence, the sentence that goes on from the SLM's token) -> diverged?
Judge = Callable[[str, str, str], Awaitable[bool]]

SENTENCE_ENDS = (". ", ".\n", "! ", "!\n", "? ", "?\n", "\n")
QUESTION = (
    "Two sentences go on from the same text.\n\nText: {context}\n\nSentence 1: {reference}\n\n"
    "Sentence 2: {alternative}\n\nReply 1 if they differ in meaning, in the result of a calculation or in the "
    "path of the reasoning, and 0 if they differ in wording only."
)


@dataclass(frozen=True)
class RouterRows:
    """One prompt's steps: the router's inputs for the SLM's token, whether it was divergent, whether it differed at
    all."""

    inputs_TF: np.ndarray
    labels_T: np.ndarray
    differs_T: np.ndarray


async def numbers_differ(context: str, reference: str, alternative: str) -> bool:
    """A rule for generated arithmetic: a sentence's meaning is its numbers and operations, in order."""
    tokens = re.compile(r"\d+|[-+*/=]")
    return tokens.findall(reference) != tokens.findall(alternative)


def ask(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """A judge that asks a model, in its chat template, and compares its probabilities of the tokens 1 and 0. Raises
    ChatError where the template refuses the question."""
    answers_N = np.array([chat.encode(tokenizer, digit)[-1] for digit in "01"])

    async def judge(context: str, reference: str, alternative: str) -> bool:
        question = QUESTION.format(context=context, reference=reference, alternative=alternative)
        tokens = chat.prompt_ids(tokenizer, [{"role": "user", "content": question}])
        scores = await engine.score(tokens, len(tokens), answers_N[None])
        return bool(scores.logprobs_TN[0, 1] > scores.logprobs_TN[0, 0])

    return judge


def _sentence(before: str, text: str) -> tuple[str, str]:
    """Split `text` where the sentence begins that `before` (its beginning) is in the midst of, and end it there."""
    start = max((before.rfind(end) + len(end) for end in SENTENCE_ENDS if end in before), default=0)
    rest = text[start:]
    ends = [rest.find(end, max(0, len(before) - start)) for end in SENTENCE_ENDS]
    stop = min((end for end in ends if end >= 0), default=len(rest) - 1)
    return text[:start], rest[: stop + 1].strip()


async def label(
    engines: Engines,
    prompt: list[int],
    judge: Judge,
    max_tokens: int,
    support: int = 100,
    sentence_tokens: int = 128,
    chunk: int = 16,
) -> RouterRows:
    """Label every step of the teacher's greedy answer to `prompt`; `support` is how many top logits the router sees."""
    slm, teacher = engines["slm"], engines["teacher"]
    assert isinstance(slm, FeatureEngine)
    ids = (await teacher.generate(prompt, Sampling(max_tokens))).ids
    tokens, start = prompt + ids, len(prompt)
    inputs_TF, scores = await asyncio.gather(
        slm.features(tokens, start, support), slm.score(tokens, start, np.array(ids)[:, None])
    )
    end_ids = (await slm.card()).end_ids
    differs_T = scores.argmax_T != np.array(ids)
    labels_T = np.zeros(len(ids), dtype=np.int8)
    text = engines.decode(ids)

    async def judged(step: int) -> None:
        state, token = prompt + ids[:step], int(scores.argmax_T[step])
        # The router sees the SLM's token, which is not the one that stands in the teacher's text.
        inputs_TF[step] = (await slm.features([*state, token], start + step, support))[0]
        other = [*ids[:step], token]
        if token not in end_ids:
            sampling = Sampling(sentence_tokens, first_step=step + 1)
            went_on = await generate_segment(teacher, prompt + other, sampling, engines.decode, SENTENCE_ENDS, chunk)
            other += went_on.ids
        before = engines.decode(ids[:step])
        context, reference = _sentence(before, text)
        _, alternative = _sentence(before, engines.decode(other))
        labels_T[step] = await judge(engines.decode(prompt) + context, reference, alternative)

    await asyncio.gather(*(judged(int(step)) for step in np.flatnonzero(differs_T)))
    return RouterRows(inputs_TF, labels_T, differs_T)
