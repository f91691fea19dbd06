"""The torch engine: transformers models on one device, many calls at once, exact.

A thread steps all running calls together: each call (see `calls`) says what to feed next, all feeds go through one
forward (see `slots`), and every call gets its outcome. A new call takes the free slot with the longest common prefix
(see `free_slots`), so nothing computed for an earlier call of the same decode is computed again; what a busy slot holds
of its prefix is copied, so the samples of one prompt read it once.

Axes: _B row, _T token, _K candidate, _R reserved row, _V vocabulary, _F feature, _H hidden.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2t_models.engines.checks import Checks
from s2t_models.engines.contract import (
    Counted,
    Draft,
    EngineDied,
    ModelCard,
    Routed,
    Sampling,
    Scores,
    Selected,
    Selection,
    Tell,
    Written,
)
from s2t_models.engines.penalising import penalised
from s2t_models.engines.sampling import pick, support
from s2t_models.engines.selector import Selector
from s2t_models.engines.stopping import StopTexts
from s2t_models.engines.torch import calls, families
from s2t_models.engines.torch.calls import Feed, Output, Procedure, Step
from s2t_models.engines.torch.free_slots import FreeSlots
from s2t_models.engines.torch.second_passes import SecondPasses
from s2t_models.engines.torch.slots import Query
from s2t_models.errors import one_line
from s2t_models.noise import uniforms
from s2t_models.settings import MultiplexSettings, TahSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2t_models.router import Router
    from s2t_models.second_pass import SecondPass

#: Tokens one forward takes at most, beyond its first feed; further feeds wait for the next.
TOKENS_A_FORWARD = 2048
#: Seconds after which a forward will not end any more: TOKENS_A_FORWARD tokens on two cores take one minute.
STUCK_S = 300.0

log = logging.getLogger(__name__)


@dataclass
class _Call:
    begin: Callable[[int], Procedure]
    tokens: list[int]
    future: Future[Any]
    procedure: Procedure | None = None
    feed: Feed | None = None
    slot: int = -1


class TorchEngine:
    """The contract over one transformers model; the card's masked ids are never generated. `selector` is that of an
    S2T-Local artifact, `router` R2R's router, and `second_pass` Think-at-Hard's decider and LoRA. `decode` is the
    tokenizer's, for stop texts.

    It can be called from any event loop: its work is done in a thread of its own. A forward that fails fails its calls;
    where the device fails, all calls raise EngineDied from then on. Raises UnsupportedModel where the model, or the
    card's context, cannot be served exactly."""

    def __init__(
        self,
        model: PreTrainedModel,
        card: ModelCard,
        slots: int = 32,
        selector: Selector | None = None,
        router: Router | None = None,
        decode: Callable[[list[int]], str] | None = None,
        second_pass: SecondPass | None = None,
    ) -> None:
        self._card, self._decode = card, decode
        self._check = Checks(card, has_selector=selector is not None)
        self._model = model
        self._selector = selector.on(model.device) if selector else None
        self._router = router.to(model.device).eval() if router is not None else None
        thinks = second_pass is not None
        self._slots, self._output = families.prepare(model, slots, card.context, context_setting(card.name), thinks)
        self._second = SecondPasses(second_pass, model, self._slots) if second_pass else None
        self._masked = torch.tensor(card.masked_ids, dtype=torch.long, device=model.device)
        if selector:
            embedding: Any = model.get_output_embeddings()
            bias, reserved = getattr(embedding, "bias", None), selector.reserved_R.tolist()
            self._reserved_rows = embedding.weight[reserved], None if bias is None else bias[reserved]
            self._bins_R = selector.bins_R.float().cpu()
        self._free = FreeSlots(self._slots)
        self._waiting: deque[_Call] = deque()
        self._running: list[_Call] = []
        self._wake = threading.Condition()
        self._closed = False
        self._died: str | None = None  # why, once it has
        self._turned = time.monotonic()
        self._written = self._read = self._cached = 0
        gc.freeze()  # models are here to stay: walking them in collections costs one decode step in twenty
        self._thread = threading.Thread(target=self._live, name=f"engine-{card.name}", daemon=True)
        self._thread.start()

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, prefix: list[int], sampling: Sampling, tell: Tell | None = None) -> Draft:
        self._check.draft(prefix, sampling)
        output = self._output_of(sampling, tell)
        return await self._call(prefix, lambda cached: calls.generate(cached, prefix, sampling, output))

    async def generate_selecting(
        self, prefix: list[int], sampling: Sampling, selection: Selection, tell: Tell | None = None
    ) -> Draft:
        self._check.draft(prefix, sampling)
        self._check.unpenalised(sampling)
        self._check.selector(selection.candidates.k)
        output = self._output_of(sampling, tell)
        return await self._call(
            prefix, lambda cached: calls.generate_selecting(cached, prefix, sampling, output, selection, self._bins_R)
        )

    async def generate_multiplex(
        self, prefix: list[int], sampling: Sampling, settings: MultiplexSettings, tell: Tell | None = None
    ) -> Draft:
        self._check.draft(prefix, sampling)
        self._check.unpenalised(sampling)
        output = self._output_of(sampling, tell)
        return await self._call(
            prefix, lambda cached: calls.generate_multiplex(cached, prefix, sampling, output, settings, self._embed)
        )

    async def generate_thinking(
        self, prefix: list[int], sampling: Sampling, settings: TahSettings, tell: Tell | None = None
    ) -> Draft:
        second = self._second
        if second is None:
            raise ValueError(f"{self._card.name} has no second pass; set tah")
        self._check.draft(prefix, sampling)
        self._check.unpenalised(sampling)
        output, embed = self._output_of(sampling, tell), self._model.get_input_embeddings()
        return await self._call(
            prefix,
            lambda cached: calls.generate_thinking(
                cached, prefix, sampling, output, settings.threshold, second.card.support, embed
            ),
        )

    def _output_of(self, sampling: Sampling, tell: Tell | None) -> Output:
        """`tell` is called on the loop of the call, not in the engine's thread."""
        stops = StopTexts(sampling.stop, self._decode)
        if tell is None:
            return Output(self._card.end_ids, stops)
        loop, call = asyncio.get_running_loop(), tell

        def pass_on(part: Written) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(call, part)

        return Output(self._card.end_ids, stops, pass_on)

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray, support: int = 0) -> Scores:
        self._check.scored(tokens, start, ids_TN)
        return await self._call(tokens, lambda cached: calls.score(cached, tokens, start, ids_TN, support))

    async def select(self, prefix: list[int], candidates_K: list[int]) -> Selected:
        self._check.candidates(prefix, candidates_K)
        return await self._call(prefix, lambda cached: calls.select(cached, prefix, candidates_K, self._bins_R))

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        self._check.steps(tokens, start)
        return await self._call(tokens, lambda cached: calls.features(cached, tokens, start, support, self._embed))

    async def route(self, tokens: list[int], start: int) -> Routed:
        router = self._router
        if router is None:
            raise ValueError(f"{self._card.name} has no router; set router.path")
        self._check.steps(tokens, start)
        return await self._call(tokens, lambda cached: calls.route(cached, tokens, start, router, self._embed))

    @property
    def counted(self) -> Counted:
        return Counted(self._written, self._read, self._cached, len(self._running))

    async def check_health(self) -> None:
        """Raise EngineDied where the thread has ended, or has not come round for STUCK_S while calls wait for it."""
        # Without the lock, which a thread that is stuck may hold.
        if self._died is not None:
            raise EngineDied(self._died)
        still = time.monotonic() - self._turned
        if still > STUCK_S and (self._waiting or self._running):
            raise EngineDied(f"{self._card.name}: calls wait and no forward has ended for {still:.0f} s")

    def close(self) -> None:
        """Stop the thread; calls still running are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    async def _call(self, tokens: list[int], begin: Callable[[int], Procedure]) -> Any:
        call = _Call(begin, tokens, Future())
        with self._wake:
            if self._closed:
                raise RuntimeError(f"engine {self._card.name} is closed")
            if self._died is not None:
                raise EngineDied(self._died)
            if not (self._waiting or self._running):
                self._turned = time.monotonic()
            self._waiting.append(call)
            self._wake.notify()
        return await asyncio.wrap_future(call.future)

    # What follows runs in the engine's thread.

    def _live(self) -> None:
        """The thread's life. What escapes the loop ends it, and no call waits for what will not come."""
        try:
            self._loop()
        except BaseException as error:
            cause = f"{type(error).__name__}: {one_line(error)}"
            died = f"{self._card.name}: the engine's thread has ended ({cause}); it is started again"
            log.error(died, exc_info=error)  # first: who is told may end the process
            with self._wake:
                self._died = died
                for call in [*self._running, *self._waiting]:
                    if call.future.set_running_or_notify_cancel():
                        call.future.set_exception(EngineDied(died))
                self._running.clear()
                self._waiting.clear()

    @torch.inference_mode()
    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._waiting or self._running or self._closed):
                    self._wake.wait()
                if self._closed:
                    for call in [*self._running, *self._waiting]:
                        call.future.cancel()
                    return
                self._turned = time.monotonic()
                self._admit_waiting()
            self._drop_cancelled()
            taken = self._take()
            if not taken:
                continue
            try:
                outcomes = self._forward(taken)
            except Exception as error:  # a failing forward fails its calls, not the engine
                if _is_of_device(error):
                    raise
                for call in taken:
                    self._finish(call, error=error)
                continue
            for call, outcome in zip(taken, outcomes, strict=True):
                self._advance(call, outcome)

    def _admit_waiting(self) -> None:
        """Give the free slots to calls in their order; one whose prefix another call is about to read waits for
        that."""
        postponed: list[_Call] = []
        try:
            while self._waiting and self._free:
                call = self._waiting.popleft()
                if self._free.is_about_to_be_read(call.tokens, (running.tokens for running in self._running)):
                    postponed.append(call)
                else:
                    self._admit(call)
        finally:
            self._waiting.extendleft(reversed(postponed))

    def _admit(self, call: _Call) -> None:
        if call.future.cancelled():
            return
        self._running.append(call)  # first: where the device fails now, it is one of those that are told
        call.slot, cached = self._free.take(call.tokens)
        self._cached += cached
        self._read += len(call.tokens) - cached
        call.procedure = call.begin(cached)
        self._advance(call, None)

    def _drop_cancelled(self) -> None:
        for call in [call for call in self._running if call.future.cancelled()]:
            self._finish(call)

    def _take(self) -> list[_Call]:
        taken: list[_Call] = []
        tokens = 0
        for call in self._running:
            assert call.feed is not None
            tokens += len(call.feed.ids)
            if taken and tokens > TOKENS_A_FORWARD:
                break
            taken.append(call)
        # The others come first next time.
        self._running = self._running[len(taken) :] + taken
        return taken

    def _advance(self, call: _Call, outcome: Any) -> None:
        assert call.procedure is not None
        try:
            call.feed = call.procedure.send(outcome)
        except StopIteration as stop:
            self._finish(call, stop.value)
        except Exception as error:
            if _is_of_device(error):
                raise
            self._finish(call, error=error)

    def _finish(self, call: _Call, result: Any = None, error: Exception | None = None) -> None:
        self._running.remove(call)
        self._free.give_back(call.slot)
        if not call.future.set_running_or_notify_cancel():  # the caller has gone
            return
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    def _forward(self, calls: list[_Call]) -> list[Any]:
        feeds = [call.feed for call in calls if call.feed is not None]
        queries = [
            Query(call.slot, feed.start, feed.ids, feed.choose is not None, feed.embedding, feed.second)
            for call, feed in zip(calls, feeds, strict=True)
        ]
        layers = self._second.layers(feeds) if self._second else ()
        hidden_TH, firsts, states_TF = self._slots.forward(queries, layers)
        outcomes: list[Any] = [None] * len(feeds)
        stepping: list[int] = []
        last: list[int] = []
        kept: list[tuple[Query, int]] = []
        for i, (feed, query, first) in enumerate(zip(feeds, queries, firsts, strict=True)):
            end = first + len(feed.ids)
            if feed.read is not None:
                read_TH = hidden_TH[end - feed.reads : end]
                outcomes[i] = feed.read(read_TH, self._logits(read_TH))
                continue
            leaf = len(feed.ids) - 1
            if feed.choose is not None:
                leaf = feed.choose(self._bin_logits(hidden_TH[first:end]))
                kept.append((query, leaf))
            stepping.append(i)
            last.append(first + leaf)
        self._slots.keep(kept)
        if stepping:
            states_BF = None if states_TF is None else states_TF[last]
            steps = self._steps(hidden_TH[last], states_BF, [feeds[i] for i in stepping])
            for i, step in zip(stepping, steps, strict=True):
                outcomes[i] = step
        return outcomes

    def _steps(self, hidden_BH: torch.Tensor, states_BF: torch.Tensor | None, feeds: list[Feed]) -> list[Step]:
        logits_BV = self._logits(hidden_BH)
        # A second pass's token replaces the one of its first pass.
        self._written += len(feeds) - (self._second.add_first(logits_BV, feeds) if self._second else 0)
        samplings = [feed.sampling or Sampling(1) for feed in feeds]
        noise = [
            float(uniforms(sampling.seed, feed.step, 1)[0]) if sampling.temperature else 0.0
            for sampling, feed in zip(samplings, feeds, strict=True)
        ]
        tokens = pick(
            penalised(logits_BV, {row: feed.repeats for row, feed in enumerate(feeds) if feed.repeats is not None}),
            [sampling.temperature for sampling in samplings],
            [sampling.top_p for sampling in samplings],
            [sampling.top_k for sampling in samplings],
            [sampling.min_p for sampling in samplings],
            noise,
        )
        steps = [Step(token, logits_BV, row) for row, token in enumerate(tokens)]
        if self._selector is not None and any(feed.trigger for feed in feeds):
            for step, trigger in zip(steps, self._selector.head(hidden_BH).tolist(), strict=True):
                step.trigger = trigger
        if self._second and states_BF is not None:
            self._second.decide(states_BF, logits_BV, feeds, steps)
        if count := max(feed.support for feed in feeds):
            ids_BN, logprobs_BN, entropy_B = (part.cpu().numpy() for part in support(logits_BV, count))
            for step, feed, ids_N, logprobs_N, entropy in zip(
                steps, feeds, ids_BN, logprobs_BN, entropy_B, strict=True
            ):
                if feed.support:
                    step.top_ids_N, step.top_logprobs_N = ids_N[: feed.support], logprobs_N[: feed.support]
                    step.entropy = float(entropy)
        return steps

    def _bin_logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """The logits [K, R] that scores are read from."""
        assert self._selector is not None
        if self._selector.ranking_head_RH is not None:
            return torch.nn.functional.linear(hidden_KH.float(), self._selector.ranking_head_RH)
        return self._output.rows(hidden_KH, *self._reserved_rows)

    def _logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Text logits: what is masked is never generated."""
        logits_TV = self._output(hidden_TH)
        if len(self._masked):
            logits_TV[:, self._masked] = -torch.inf
        return logits_TV

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self._model.get_input_embeddings()(torch.tensor(ids, device=self._model.device))


def _is_of_device(error: Exception) -> bool:
    """Whether the device failed under the process: after an illegal access, or a fault of the hardware, every further
    call of it fails too. Where it had no room for one call, it has for others."""
    return isinstance(error, torch.AcceleratorError) and "out of memory" not in str(error)


def context_setting(name: str) -> str:
    """The recipe's key for the context of the engine of that name."""
    return f"{'teacher' if name == 'teacher' else 'slm'}.context"
