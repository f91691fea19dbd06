"""SpecReason: the SLM writes a step of reasoning, the teacher scores it 0-9, and writes the step itself where it is
poor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from s2t_models import chat, loading
from s2t_models.answers.final_answer import boxed
from s2t_models.engines.contract import ContextOverflow, Decision, Engine, Finish, Sampling, Usage
from s2t_models.hosting import Hosting
from s2t_models.policies.base import (
    CORE,
    Done,
    Engines,
    Event,
    Needs,
    Policy,
    Request,
    Source,
    Span,
    check_fits,
    sampling,
)
from s2t_models.policies.errors import PolicyError
from s2t_models.policies.segments import ENDED, generate_segment
from s2t_models.settings import SpecReasonSettings

#: What the teacher is asked about the text so far, and how its reply begins; the next token is the score.
QUESTION = (
    "Rate the last step of the reasoning above from 0 to 9. Judge only whether it is correct and follows from what "
    "came before; ignore its style. Reply with one digit."
)
REPLY = "Score: "
#: The teacher's own draws, independent of those of the step it rejected.
TEACHER_SEED = 1 << 32


@dataclass(frozen=True)
class Digits:
    """The tokens that say a score: `ids_N`, and the digit of each. A digit may have two, one that begins a word."""

    ids_N: np.ndarray
    digit_N: np.ndarray

    @classmethod
    def of(cls, engines: Engines) -> Digits:
        """Raises ValueError where the tokenizer has no token for a digit alone."""
        found: dict[int, int] = {}
        for digit in range(10):
            spellings = [engines.encode(text) for text in (str(digit), f" {digit}")]
            own = [ids[-1] for ids in spellings if ids and engines.decode(ids[-1:]).strip() == str(digit)]
            if not own:
                raise ValueError(f"specreason: the tokenizer has no token for the digit {digit} alone")
            found |= dict.fromkeys(own, digit)
        return cls(np.array(list(found)), np.array(list(found.values())))

    def probabilities(self, logprobs_N: np.ndarray) -> np.ndarray:
        """p(digit) among the ten, [10], from the tokens' log-probabilities."""
        weights_N = np.exp(logprobs_N.astype(np.float64) - logprobs_N.max())
        weights = np.bincount(self.digit_N, weights_N, minlength=10)
        return weights / weights.sum()


@dataclass(frozen=True)
class SpecReason(Policy):
    """Steps of the SLM, accepted or written again by the teacher; see the settings. `verify` is the text that follows
    the text so far to ask for the score, in the pair's own chat template."""

    name: str
    verify: str
    settings: SpecReasonSettings = field(default_factory=SpecReasonSettings)
    chunk: int = 16
    takes_penalties: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        return {"slm": CORE, "teacher": CORE}

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        question, digits, sampler = engines.encode(self.verify), Digits.of(engines), self.settings.sampler
        await check_fits(engines, ("slm",), request)
        teacher = engines["teacher"]
        card = await teacher.card()
        # The text ends where the teacher's context leaves no room to be asked about it.
        most = min(request.max_tokens, card.context - len(request.prompt) - len(question))
        if most < 1:
            raise ContextOverflow(
                f"the prompt's {len(request.prompt)} tokens and the {len(question)} of the question to the judge "
                f"do not fit the {card.context} tokens of teacher; shorten the prompt"
            )
        usage: dict[str, Usage] = defaultdict(Usage)
        tokens, before, finish = list(request.prompt), "", None
        while finish is None and (step := len(tokens) - len(request.prompt)) < most:
            limit = min(self.settings.step_tokens, most - step)
            asked = sampling(sampler, request, limit, first_step=step)
            ids, finish = await self._write("slm", engines, tokens, asked, usage)
            source: Source = "slm"
            shown = ids[:-1] if ids[-1] in card.end_ids else ids
            value = await self._verify(teacher, tokens + shown + question, digits, usage)
            if value < self.settings.accept:
                asked = sampling(sampler, request, limit, request.seed + TEACHER_SEED, first_step=step)
                ids, finish = await self._write("teacher", engines, tokens, asked, usage)
                source = "teacher"
            yield Span(ids, source)
            yield Decision(step, value, [], [], [], [], chosen=ids[0])
            tokens = tokens + ids
            text = engines.decode(ids).strip()
            if finish is None and boxed(text) is not None:
                finish = "end"
            elif finish is None and text == before:
                finish = "length"  # going in circles: there is no answer to wait for
            before = text
        yield Done(finish or "length", dict(usage))

    async def _write(
        self, name: str, engines: Engines, tokens: list[int], asked: Sampling, usage: dict[str, Usage]
    ) -> tuple[list[int], Finish | None]:
        segment = await generate_segment(
            engines[name], tokens, asked, engines.decode, (self.settings.delimiter,), self.chunk
        )
        usage[name] += segment.usage
        # A step that only grew too long is not the end of the text.
        return segment.ids, segment.finish if segment.finish in ENDED else None

    async def _verify(self, teacher: Engine, tokens: list[int], digits: Digits, usage: dict[str, Usage]) -> float:
        scores = await teacher.score(tokens, len(tokens), digits.ids_N[None])
        usage["teacher"] += scores.usage
        p = digits.probabilities(scores.logprobs_TN[0])
        return float(p.argmax()) if self.settings.score == "greedy" else float(p @ np.arange(10))


def names(hosting: Hosting) -> list[str]:
    return ["specreason"]


def build(name: str, hosting: Hosting) -> Policy | None:
    if name != "specreason":
        return None
    try:
        question = chat.follow_up(loading.load_tokenizer(hosting.tokenizer), QUESTION)
    except chat.ChatError as error:
        raise PolicyError(f"{name}: {error}") from None
    settings = hosting.recipe.policies
    return SpecReason(name, question + REPLY, settings.specreason, settings.chunk)
