"""SpecReason: the SLM writes a step of reasoning, the teacher scores it 0-9, and writes the step itself where it is poor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from s2t_models.answers.final_answer import boxed
from s2t_models.engines.contract import ContextOverflow, Decision, Engine, Finish, Sampling, Usage
from s2t_models.policies.base import Done, Engines, Event, Request, Source, Span, Tokens, check_fits
from s2t_models.policies.segments import generate_segment

#: What follows the text so far when the teacher is asked; the next token is the score.
VERIFY = (
    "<|im_end|>\n<|im_start|>user\nRate the last step of the reasoning above from 0 to 9. Judge only whether it is correct and "
    "follows from what came before; ignore its style. Reply with one digit.<|im_end|>\n<|im_start|>assistant\nScore: "
)
PUBLISHED = Tokens(temperature=0.6, top_p=0.95)
#: The teacher's own draws, independent of those of the step it rejected.
TEACHER_SEED = 1 << 32


@dataclass(frozen=True)
class SpecReason:
    """A step ends at `delimiter` (a blank line in the published code) or after `step_tokens`; it is accepted at a score of
    `accept` or more. `score` is the likeliest digit, or the mean over the ten digits' probabilities."""

    name: str
    accept: int = 7
    delimiter: str = "\n\n"
    step_tokens: int = 512
    score: Literal["greedy", "expected"] = "greedy"
    tokens: Tokens = PUBLISHED
    verify: str = VERIFY
    chunk: int = 16
    needs: tuple[str, ...] = ("slm", "teacher")

    async def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]:
        question = engines.encode(self.verify)
        digits_N = np.array([engines.encode(str(digit))[-1] for digit in range(10)])
        await check_fits(engines, ("slm",), request)
        teacher = engines["teacher"]
        card = await teacher.card()
        # The text ends where the teacher's context leaves no room to be asked about it.
        most = min(request.max_tokens, card.context - len(request.prompt) - len(question))
        if most < 1:
            raise ContextOverflow(
                f"the prompt's {len(request.prompt)} tokens and the {len(question)} of the question to the judge do not fit "
                f"the {card.context} tokens of teacher; shorten the prompt"
            )
        usage: dict[str, Usage] = defaultdict(Usage)
        tokens, before, finish = list(request.prompt), "", None
        while finish is None and (step := len(tokens) - len(request.prompt)) < most:
            limit = min(self.step_tokens, most - step)
            sampling = self.tokens.sampling(request, limit, first_step=step)
            ids, finish = await self._write("slm", engines, tokens, sampling, usage)
            source: Source = "slm"
            shown = ids[:-1] if ids[-1] in card.end_ids else ids
            value = await self._verify(teacher, tokens + shown + question, digits_N, usage)
            if value < self.accept:
                sampling = self.tokens.sampling(request, limit, request.seed + TEACHER_SEED, first_step=step)
                ids, finish = await self._write("teacher", engines, tokens, sampling, usage)
                source = "teacher"
            yield Span(ids, source)
            yield Decision(step=step, value=value, candidates_K=[], logprobs_K=[], scores_K=[], chosen=ids[0])
            tokens = tokens + ids
            text = engines.decode(ids).strip()
            if finish is None and boxed(text) is not None:
                finish = "end"
            elif finish is None and text == before:
                finish = "length"  # going in circles: there is no answer to wait for
            before = text
        yield Done(finish or "length", dict(usage))

    async def _write(
        self, name: str, engines: Engines, tokens: list[int], sampling: Sampling, usage: dict[str, Usage]
    ) -> tuple[list[int], Finish | None]:
        segment = await generate_segment(engines[name], tokens, sampling, engines.decode, (self.delimiter,), self.chunk)
        usage[name] += segment.usage
        # A step that only grew too long is not the end of the text.
        return segment.ids, "end" if segment.finish == "end" else None

    async def _verify(self, teacher: Engine, tokens: list[int], digits_N: np.ndarray, usage: dict[str, Usage]) -> float:
        scores = await teacher.score(tokens, len(tokens), digits_N[None])
        usage["teacher"] += scores.usage
        logprobs_N = scores.logprobs_TN[0].astype(np.float64)
        if self.score == "greedy":
            return float(logprobs_N.argmax())
        weights_N = np.exp(logprobs_N - logprobs_N.max())
        return float((weights_N / weights_N.sum()) @ np.arange(10))
