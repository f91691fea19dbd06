"""The torch engine: transformers models on one device, many calls at once, exact.

A thread steps all running calls together: each call is a row (see `rows`) that says what to feed next, all feeds go
through one forward (see `slots`), and every row gets its outcome. A new call takes the free slot with the longest common
prefix, so nothing computed for an earlier call of the same decode is computed again; what a busy slot holds of its prefix is
copied, so the samples of one prompt read it once.

Axes: _B row, _T token, _K candidate, _R reserved row, _V vocabulary, _N support, _H hidden.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from s2t_models.engines.contract import (
    ContextOverflow,
    Draft,
    ModelCard,
    Multiplex,
    Sampling,
    Scores,
    Selection,
)
from s2t_models.engines.torch import calls as rows
from s2t_models.engines.torch.calls import Feed, Row, Step
from s2t_models.engines.torch.sampling import pick, support
from s2t_models.engines.torch.slots import LEAF_ROOM, Query, Slots
from s2t_models.noise import uniforms
from s2t_models.recipe import Model
from s2t_models.reserved import bins as uniform_bins

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from s2t_models.artifact import Artifact

#: Tokens one forward takes at most, beyond its first feed; further feeds wait for the next.
TOKENS_A_FORWARD = 2048
#: Tokens of a prefix that another slot has to hold beyond the own one for a copy.
WORTH_COPYING = 16


@dataclass
class _Call:
    make_row: Callable[[int], Row]
    tokens: list[int]
    future: Future[Any]
    row: Row | None = None
    feed: Feed | None = None
    slot: int = -1


class TorchEngine:
    """The contract over one transformers model. `head` is the trigger head of an S2T-Local artifact, `bins` the values of its
    reserved rows, by default uniform (Eq. 5)."""

    def __init__(
        self,
        model: PreTrainedModel,
        card: ModelCard,
        slots: int = 32,
        head: torch.nn.Module | None = None,
        bins: Sequence[float] = (),
    ) -> None:
        self._card = card
        self._model = model
        self._head = head.to(model.device).eval() if head is not None else None
        self._slots = Slots(model, slots, card.context)
        self._reserved = torch.tensor(card.reserved_ids, dtype=torch.long, device=model.device)
        self._bins_R = torch.tensor(bins) if bins else uniform_bins(len(card.reserved_ids))
        self._readout_HR = model.get_output_embeddings().weight[self._reserved].T.detach()
        self._free = dict.fromkeys(range(slots))  # in order of last use
        self._waiting: deque[_Call] = deque()
        self._running: list[_Call] = []
        self._wake = threading.Condition()
        self._closed = False
        gc.freeze()  # models are here to stay: walking them in collections costs one decode step in twenty
        self._thread = threading.Thread(target=self._loop, name=f"engine-{card.name}", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, settings: Model, name: str, reserved_ids: tuple[int, ...] = ()) -> TorchEngine:
        """An engine over the model that the settings name; `reserved_ids` are those of the pair, of which it may have fewer rows."""
        from s2t_models import loading

        model = loading.load_model(settings)
        reserved_ids = tuple(row for row in reserved_ids if row < model.config.vocab_size)
        return cls(model, _card(model, settings, name, reserved_ids), settings.slots)

    @classmethod
    def load_artifact(cls, artifact: Artifact, settings: Model, name: str) -> TorchEngine:
        """An engine over a trained S2T-Local model, on the device and slots that `settings` (the SLM's) give."""
        from s2t_models import loading

        merged = artifact.model(settings)
        model = loading.load_model(merged)
        card = _card(model, merged, name, artifact.card.reserved_ids, has_selector=True)
        return cls(model, card, settings.slots, artifact.head(), artifact.card.bins)

    async def card(self) -> ModelCard:
        return self._card

    async def generate(self, prefix: list[int], sampling: Sampling) -> Draft:
        self._check_draft(prefix, sampling)
        return await self._call(prefix, lambda cached: rows.generate(cached, prefix, sampling, self._card.end_ids))

    async def generate_selecting(self, prefix: list[int], sampling: Sampling, selection: Selection) -> Draft:
        self._check_draft(prefix, sampling)
        self._check_selector(selection.k)
        return await self._call(
            prefix,
            lambda cached: rows.generate_selecting(
                cached, prefix, sampling, self._card.end_ids, selection, self._bins_R
            ),
        )

    async def generate_multiplex(self, prefix: list[int], sampling: Sampling, multiplex: Multiplex) -> Draft:
        self._check_draft(prefix, sampling)
        return await self._call(
            prefix,
            lambda cached: rows.generate_multiplex(
                cached, prefix, sampling, self._card.end_ids, multiplex, self._embed
            ),
        )

    async def score(self, tokens: list[int], start: int, ids_TN: np.ndarray) -> Scores:
        self._check(tokens, 0)
        if not 1 <= start <= start + len(ids_TN) - 1 <= len(tokens):
            raise ValueError(f"score: {len(ids_TN)} rows from position {start} do not fit {len(tokens)} tokens")
        self._check_ids(int(ids_TN.min(initial=0)), int(ids_TN.max(initial=0)))
        return await self._call(tokens, lambda cached: rows.score(cached, tokens, start, ids_TN))

    async def select(self, prefix: list[int], candidates_K: list[int]) -> np.ndarray:
        self._check(prefix, 1)
        self._check_selector(len(candidates_K))
        self._check_ids(min(candidates_K), max(candidates_K))
        return await self._call(prefix, lambda cached: rows.select(cached, prefix, candidates_K))

    async def features(self, tokens: list[int], start: int, support: int) -> np.ndarray:
        self._check(tokens, 0)
        if not 1 <= start < len(tokens):
            raise ValueError(f"features: no steps from position {start} in {len(tokens)} tokens")
        return await self._call(tokens, lambda cached: rows.features(cached, tokens, start, support, self._embed))

    def close(self) -> None:
        """Stop the thread; calls still running are cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _check(self, prefix: list[int], new: int) -> None:
        if not prefix:
            raise ValueError("the prefix is empty: an engine needs at least one token to go on from")
        if len(prefix) + new > self._card.context:
            raise ContextOverflow(
                f"{len(prefix)} tokens and {new} to generate do not fit {self._card.name}'s context of "
                f"{self._card.context}"
            )
        self._check_ids(min(prefix), max(prefix))

    def _check_draft(self, prefix: list[int], sampling: Sampling) -> None:
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens = {sampling.max_tokens}: a draft has at least one token")
        self._check(prefix, sampling.max_tokens)

    def _check_ids(self, lowest: int, highest: int) -> None:
        """Here, because in the forward a wrong id would cost every call in it its answer, and a GPU its state."""
        if lowest < 0 or highest >= self._card.vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"{self._card.name}: token id {wrong} lies outside the vocabulary, 0 to {self._card.vocabulary - 1}"
            )

    def _check_selector(self, k: int) -> None:
        if not self._card.has_selector:
            raise ValueError(f"{self._card.name} has no selector: it is not an S2T-Local artifact")
        if k > LEAF_ROOM:
            raise ValueError(f"{k} candidates: the engine scores at most {LEAF_ROOM} at a step")

    async def _call(self, tokens: list[int], make_row: Callable[[int], Row]) -> Any:
        call = _Call(make_row, tokens, Future())
        with self._wake:
            if self._closed:
                raise RuntimeError(f"engine {self._card.name} is closed")
            self._waiting.append(call)
            self._wake.notify()
        return await asyncio.wrap_future(call.future)

    # What follows runs in the engine's thread.

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
                self._admit_waiting()
            self._drop_cancelled()
            taken = self._take()
            if not taken:
                continue
            try:
                outcomes = self._forward(taken)
            except Exception as error:  # a failing forward fails its calls, not the engine
                for call in taken:
                    self._finish(call, error=error)
                continue
            for call, outcome in zip(taken, outcomes, strict=True):
                self._advance(call, outcome)

    def _admit_waiting(self) -> None:
        """Give the free slots to calls in their order; one whose prefix another call is about to read waits for that."""
        postponed: list[_Call] = []
        while self._waiting and self._free:
            call = self._waiting.popleft()
            if self._is_about_to_be_read(call.tokens):
                postponed.append(call)
            else:
                self._admit(call)
        self._waiting.extendleft(reversed(postponed))

    def _is_about_to_be_read(self, tokens: list[int]) -> bool:
        """Whether a running call has half of the tokens still to read, and no slot holds them yet."""
        half = max(len(tokens) // 2, WORTH_COPYING)
        beginning = tokens[:half]
        is_held = any(held[:half] == beginning for held in self._slots.tokens)
        return not is_held and any(call.tokens[:half] == beginning for call in self._running)

    def _admit(self, call: _Call) -> None:
        if call.future.cancelled():
            return
        call.slot = self._choose_slot(call.tokens)
        del self._free[call.slot]
        cached = _common(self._slots.tokens[call.slot], call.tokens)
        # A template that all prompts share is not worth the look at every slot: half of the tokens are.
        worth = max(cached + WORTH_COPYING, len(call.tokens) // 2)
        if worth < len(call.tokens):
            beginning = call.tokens[:worth]
            source = next((slot for slot, held in enumerate(self._slots.tokens) if held[:worth] == beginning), None)
            if source is not None:
                cached = _common(self._slots.tokens[source], call.tokens)
                self._slots.copy(source, call.slot, cached)
        call.row = call.make_row(cached)
        self._running.append(call)
        self._advance(call, None)

    def _choose_slot(self, tokens: list[int]) -> int:
        """The free slot that holds the longest prefix of the tokens, where that is at least half of what it holds; else the one
        unused for longest. A template that all prompts share must not cost a decode between two calls its slot."""
        fits = {}
        for slot in self._free:
            known = self._slots.tokens[slot]
            half = (len(known) + 1) // 2
            if known[:half] == tokens[:half]:
                fits[slot] = _common(known, tokens)
        return max(fits, key=lambda slot: fits[slot], default=next(iter(self._free)))

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
        assert call.row is not None
        try:
            call.feed = call.row.send(outcome)
        except StopIteration as stop:
            self._finish(call, stop.value)
        except Exception as error:
            self._finish(call, error=error)

    def _finish(self, call: _Call, result: Any = None, error: Exception | None = None) -> None:
        self._running.remove(call)
        self._free[call.slot] = None
        if not call.future.set_running_or_notify_cancel():  # the caller has gone
            return
        if error is not None:
            call.future.set_exception(error)
        else:
            call.future.set_result(result)

    def _forward(self, calls: list[_Call]) -> list[Any]:
        feeds = [call.feed for call in calls if call.feed is not None]
        queries = [
            Query(call.slot, feed.start, feed.ids, feed.choose is not None, feed.embedding)
            for call, feed in zip(calls, feeds, strict=True)
        ]
        hidden_TH, firsts = self._slots.forward(queries)
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
                leaf = feed.choose(hidden_TH[first:end] @ self._readout_HR)
                kept.append((query, leaf))
            stepping.append(i)
            last.append(first + leaf)
        self._slots.keep(kept)
        if stepping:
            for i, step in zip(stepping, self._steps(hidden_TH[last], [feeds[i] for i in stepping]), strict=True):
                outcomes[i] = step
        return outcomes

    def _steps(self, hidden_BH: torch.Tensor, feeds: list[Feed]) -> list[Step]:
        logits_BV = self._logits(hidden_BH)
        samplings = [feed.sampling or Sampling(1) for feed in feeds]
        noise = [
            float(uniforms(sampling.seed, feed.step, 1)[0]) if sampling.temperature else 0.0
            for sampling, feed in zip(samplings, feeds, strict=True)
        ]
        tokens = pick(
            logits_BV,
            [sampling.temperature for sampling in samplings],
            [sampling.top_p for sampling in samplings],
            [sampling.top_k for sampling in samplings],
            noise,
        )
        steps = [Step(token, logits_BV, row) for row, token in enumerate(tokens)]
        if self._head is not None and any(feed.trigger for feed in feeds):
            for step, trigger in zip(steps, self._head(hidden_BH).tolist(), strict=True):
                step.trigger = trigger
        if count := max(feed.support for feed in feeds):
            ids_BN, logprobs_BN, entropy_B = (part.cpu().numpy() for part in support(logits_BV, count))
            for step, feed, ids_N, logprobs_N, entropy in zip(
                steps, feeds, ids_BN, logprobs_BN, entropy_B, strict=True
            ):
                if feed.support:
                    step.top_ids_N, step.top_logprobs_N = ids_N[: feed.support], logprobs_N[: feed.support]
                    step.entropy = float(entropy)
        return steps

    def _logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Text logits: the reserved rows are masked, so they are never generated."""
        logits_TV = self._model.get_output_embeddings()(hidden_TH)
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        if cap:
            logits_TV = torch.tanh(logits_TV / cap) * cap
        if len(self._reserved):
            logits_TV[:, self._reserved] = -torch.inf
        return logits_TV

    def _embed(self, ids: list[int]) -> torch.Tensor:
        return self._model.get_input_embeddings()(torch.tensor(ids, device=self._model.device))


def _common(known: list[int], tokens: list[int]) -> int:
    """Length of the longest common prefix, by bisection: comparing slices is quick, comparing items is not."""
    same, limit = 0, min(len(known), len(tokens))
    while same < limit:
        middle = (same + limit + 1) // 2
        if known[same:middle] == tokens[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def _card(
    model: PreTrainedModel, settings: Model, name: str, reserved_ids: tuple[int, ...], has_selector: bool = False
) -> ModelCard:
    from s2t_models import loading

    end = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    ends = tuple(end) if isinstance(end, list) else (end,) if end is not None else ()
    longest = getattr(model.config, "max_position_embeddings", 4096)
    return ModelCard(
        name=name,
        weights=loading.weights_hash(settings),
        tokenizer=loading.tokenizer_hash(settings),
        vocabulary=int(model.config.vocab_size),
        context=settings.context or min(longest, 4096),
        end_ids=ends,
        reserved_ids=reserved_ids,
        has_selector=has_selector,
    )
