"""The engine contract over vLLM's `AsyncLLM`.

A call is a request, or several: vLLM batches them, keeps their prefixes in its paged cache, and reads a prefix that it
has seen once. What is S2T's happens in the worker (`worker`, `sampler`); here calls become requests and their answers
drafts, scores and selections.

Axes: _T step, _N support, _K candidate.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from s2t_models.engines.checks import Checks
from s2t_models.engines.contract import (
    Counted,
    Draft,
    EngineDied,
    Finish,
    ModelCard,
    Sampling,
    Scores,
    Selected,
    Support,
    Tell,
    Triggered,
    Usage,
    Written,
)
from s2t_models.engines.stopping import StopTexts
from s2t_models.engines.vllm.requests import LEADING, Asked, Decoding, Labelling, Leaf, as_they_were, pack

#: Tokens of a running request that come at once: often enough to show progress, seldom enough to cost nothing.
TOKENS_AT_ONCE = 16


@dataclass
class _Answer:
    """What came of a request: its tokens, their columns (ids and values, [T, W] each, W 0 where none were asked for),
    and for a labelling its rows."""

    ids: list[int] = field(default_factory=list)
    column_ids: list[int] = field(default_factory=list)
    column_values: list[float] = field(default_factory=list)
    cached: int = 0
    finish: str | None = None
    label: Any = None

    def add(self, output: Any) -> None:
        """A further part of the request's output."""
        completion = output.outputs[0]
        self.ids += completion.token_ids
        if completion.logprobs is not None:
            self.column_ids += completion.logprobs.token_ids
            self.column_values += completion.logprobs.logprobs
        self.cached = max(self.cached, output.num_cached_tokens or 0)
        self.label = output.prompt_logprobs or self.label
        self.finish = completion.finish_reason or self.finish

    def cut(self, count: int, columns: int) -> None:
        """Keep the first `count` tokens, of `columns` columns each."""
        del self.ids[count:], self.column_ids[count * columns :], self.column_values[count * columns :]

    def columns(self, count: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
        ids_TW = as_they_were(np.array(self.column_ids, dtype=np.int64).reshape(-1, count), vocabulary)
        return ids_TW, np.array(self.column_values, dtype=np.float32).reshape(-1, count)


#: Looks at a request's answer after each of its outputs; True ends the request there.
Watch = Callable[[_Answer], bool]


class VllmEngine:
    """The contract over one vLLM model; the card's masked ids are never generated. `artifact` is the folder of the
    S2T-Local artifact whose merged model this is, `decode` the tokenizer's, for stop texts. All calls raise EngineDied
    once vLLM's processes are gone."""

    def __init__(
        self,
        arguments: AsyncEngineArgs,
        card: ModelCard,
        artifact: str | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self._card, self._decode = card, decode
        self._check = Checks(card, has_selector=artifact is not None)
        self._artifact = artifact
        self._names = itertools.count()
        self._written = self._read = self._cached = self._running = 0
        # vLLM belongs to one event loop; ours can be called from any.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"engine-{card.name}", daemon=True)
        self._thread.start()
        try:
            self._llm = asyncio.run_coroutine_threadsafe(self._start(arguments), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    async def _start(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(arguments)
        prepare = (list(self._card.masked_ids), self._card.end_ids[0], self._artifact)
        await llm.collective_rpc("s2t_prepare", args=prepare)
        return llm

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        self._check.draft(prefix, sampling)
        asked = Decoding(
            seed=sampling.seed,
            first_step=sampling.first_step,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            penalties=astuple(sampling.penalties) if sampling.penalties else (),
            support=sampling.support,
            threshold=sampling.trigger_threshold,
            warmup=sampling.trigger_warmup,
            trigger_support=sampling.trigger_support,
        )
        watch = self._watch(prefix, sampling, asked, tell)
        return self._draft(await self._run(prefix, asked, sampling.max_tokens, watch=watch), prefix, asked)

    def _watch(self, prefix: list[int], sampling: Sampling, asked: Decoding, tell: Tell | None) -> Watch | None:
        """Ends the request at a stop text, and tells of its tokens, on the loop of the call."""
        stops = StopTexts(sampling.stop, self._decode)
        if tell is None and not stops:
            return None
        before = prefix[len(prefix) - sampling.first_step :]
        loop, seen = asyncio.get_running_loop(), 0

        def watch(answer: _Answer) -> bool:
            nonlocal seen
            written = len(answer.ids) - self._fired(answer, asked)
            end = stops.cut(before + answer.ids[:written], len(before) + seen)
            if end is not None:
                written = end - len(before)
                answer.cut(written, asked.columns)
                answer.finish = "text"
            if tell is not None and written > seen:
                part = Written(answer.ids[seen:written], self._support(answer, asked, seen, written))
                loop.call_soon_threadsafe(tell, part)
            seen = written
            return end is not None

        return watch

    def _fired(self, answer: _Answer, asked: Decoding) -> bool:
        """Whether the trigger head stopped the request: its last token is then not one of the text."""
        if asked.threshold is None or answer.finish is None or not answer.column_ids:
            return False
        column_ids, _ = answer.columns(asked.columns, self._card.vocabulary)
        return bool(column_ids[-1, 1])

    def _support(self, answer: _Answer, asked: Decoding, begin: int, end: int) -> Support | None:
        if not asked.support:
            return None
        column_ids, values = answer.columns(asked.columns, self._card.vocabulary)
        steps, shown = slice(begin, end), slice(LEADING, LEADING + asked.support)
        return Support(column_ids[steps, shown], values[steps, shown], values[steps, 1])

    def _draft(self, answer: _Answer, prefix: list[int], asked: Decoding) -> Draft:
        usage = Usage(prefill=len(prefix) - answer.cached, forwards=len(answer.ids))
        ids, finish, triggered = answer.ids, _FINISH[answer.finish], None
        if self._fired(answer, asked):
            ids, finish = ids[:-1], "trigger"
            column_ids, values = answer.columns(asked.columns, self._card.vocabulary)
            shown = slice(LEADING, LEADING + asked.trigger_support)
            triggered = Triggered(float(values[-1, 0]), column_ids[-1, shown], values[-1, shown])
        usage += Usage(decode=len(ids))
        return Draft(ids, finish, usage, self._support(answer, asked, 0, len(ids)), triggered)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        self._check.scored(tokens, start, ids_TN)
        if not ids_TN.size:
            return Scores(ids_TN.astype(np.float32), np.empty(0, np.int64), Usage())
        asked = Labelling.of(start, ids_TN, support)
        # What lies past the last row is not read.
        prompt = tokens[: start + len(ids_TN) - 1]
        answer = await self._run(prompt, asked, 1)
        usage = Usage(prefill=len(prompt) - answer.cached, forwards=1)
        scores = _scores(answer, asked, usage)
        if np.isnan(scores.logprobs_TN).any():  # some of these were in the cache, where no hidden states are kept
            answer = await self._run(prompt, asked, 1, reads_cache=False)
            scores = _scores(answer, asked, usage + Usage(prefill=len(prompt), forwards=1))
        return scores

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        self._check.candidates(prefix, candidates_K)
        answers = await asyncio.gather(*(self._run([*prefix, token], Leaf(), 1) for token in candidates_K))
        scores_K = np.array([answer.column_values[0] for answer in answers])
        read = sum(len(prefix) - answer.cached for answer in answers)
        return Selected(scores_K, Usage(prefill=read, leaves=len(candidates_K), forwards=1))

    @property
    def counted(self) -> Counted:
        return Counted(self._written, self._read, self._cached, self._running)

    async def check_health(self) -> None:
        """Raise EngineDied where vLLM's processes are gone."""
        if self._llm.errored:
            raise self._died()

    def close(self) -> None:
        """End vLLM's processes; calls still running fail."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._end_loop()
        del self._llm  # now: when Python ends, what its finaliser needs is gone

    async def _end(self) -> None:
        self._llm.shutdown()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _run(
        self, prompt: list[int], asked: Asked, max_tokens: int, reads_cache: bool = True, watch: Watch | None = None
    ) -> _Answer:
        """One request, to its end. Cancelled, it frees its blocks."""
        params = self._params(asked, max_tokens, reads_cache, at_once=1 if watch else TOKENS_AT_ONCE)
        running = self._request(prompt, params, isinstance(asked, Decoding), watch)
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(running, self._loop))

    async def _request(self, prompt: list[int], params: SamplingParams, writes: bool, watch: Watch | None) -> _Answer:
        answer = _Answer()
        name = f"{self._card.name}-{next(self._names)}"
        self._running += 1
        try:
            async with aclosing(self._llm.generate(TokensPrompt(prompt_token_ids=prompt), params, name)) as outputs:
                async for output in outputs:
                    answer.add(output)
                    self._written += len(output.outputs[0].token_ids) if writes else 0
                    if watch is not None and watch(answer):
                        break
        except EngineDeadError as error:
            raise self._died() from error
        finally:
            self._running -= 1
            self._cached += answer.cached
            self._read += len(prompt) - answer.cached
        return answer

    def _params(self, asked: Asked, max_tokens: int, reads_cache: bool, at_once: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,  # the sampler in the worker goes by what is asked for, not by this
            stop_token_ids=list(self._card.end_ids),
            ignore_eos=True,
            detokenize=False,
            logprobs=asked.columns - 1 if asked.columns else None,
            prompt_logprobs=asked.width if isinstance(asked, Labelling) else None,
            skip_reading_prefix_cache=not reads_cache,
            flat_logprobs=True,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=at_once,
            extra_args=pack(asked),
        )

    def _died(self) -> EngineDied:
        return EngineDied(f"{self._card.name}: vLLM's engine process has ended; it is started again")


_FINISH: dict[str | None, Finish] = {"stop": "end", "length": "length", "text": "stop"}


def _scores(answer: _Answer, asked: Labelling, usage: Usage) -> Scores:
    """What a labelling's answer says."""
    ids_TW = np.array(answer.label.token_ids, dtype=np.int64).reshape(asked.rows, 1 + asked.width)
    values_TW = np.array(answer.label.logprobs, dtype=np.float32).reshape(asked.rows, 1 + asked.width)
    top = asked.width - asked.support + 1
    support = Support(ids_TW[:, top:], values_TW[:, top:]) if asked.support else None
    return Scores(values_TW[:, 1:top], ids_TW[:, 0], usage, support)
