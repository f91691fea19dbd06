"""What a policy is: a way of decoding, one system of the paper's table.

A policy is an async generator over engines. It yields spans of tokens with their source and the decisions taken, and
ends with a `Done`. Equation 9 of the paper is the shape: trigger x proposer x scorer. A policy knows nothing of Ray,
HTTP, tasks or grading.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from s2t_models.engines.contract import (
    NO_PENALTIES,
    Capability,
    ContextOverflow,
    Decision,
    Draft,
    Engine,
    Finish,
    Penalties,
    Sampling,
    Support,
    Tell,
    Usage,
    Written,
)
from s2t_models.engines.telling import told
from s2t_models.settings import SamplerSettings

T = TypeVar("T")
Source = Literal["slm", "teacher", "selected"]


@dataclass(frozen=True)
class Request:
    """One prompt to decode. `temperature`, `top_p`, `top_k` and `min_p` override what a policy would use itself (None:
    its own setting); `penalties` are for policies that take them; the output ends with the token that completes one of
    the `stop` texts; `options` are the texts of a multiple choice's options A, B, ..., for policies that vote.
    `support` asks for the top-N of every step of a policy that is `scored_by` an engine. `live`: the tokens are wanted
    as they are written, not at the end."""

    prompt: list[int]
    max_tokens: int
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    penalties: Penalties = NO_PENALTIES
    stop: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    support: int = 0
    live: bool = False


@dataclass(frozen=True)
class Span:
    """Consecutive output tokens of one source, with the support of their steps where it was asked for."""

    ids: list[int]
    source: Source
    support: Support | None = None


@dataclass(frozen=True)
class Done:
    """The end of a decode. `usage` is keyed by engine name ("slm", "teacher", "s2t-local", ...).

    `samples` holds every sample's ids where the policy votes (maj@n)."""

    finish: Finish
    usage: dict[str, Usage]
    samples: list[list[int]] = field(default_factory=list)


Event = Span | Decision | Done


@dataclass(frozen=True)
class Engines:
    """The engines a policy may call by name. A missing one raises a KeyError that names it.

    `encode` and `decode` are the pair's tokenizer; `encode` reads special tokens written in the text as such."""

    by_name: dict[str, Engine]
    decode: Callable[[list[int]], str]
    encode: Callable[[str], list[int]]
    places: Callable[[Collection[str]], AbstractAsyncContextManager[Engines]] | None = None

    def __getitem__(self, name: str) -> Engine:
        if name not in self.by_name:
            raise KeyError(f"no engine named {name!r} is running; there are: {', '.join(sorted(self.by_name))}")
        return self.by_name[name]

    def place(self, names: Collection[str]) -> AbstractAsyncContextManager[Engines]:
        """A decode that calls the engines of these `names` runs inside, on the engines that it is given: it may have to
        wait for its turn, and replicas that it calls again have its prefix."""
        return nullcontext(self) if self.places is None else self.places(names)


#: Engine name -> the capabilities that are called there, beyond the core.
Needs = Mapping[str, frozenset[Capability]]
CORE: frozenset[Capability] = frozenset()


class Policy(ABC):
    """A way of decoding. `name` is the model name it is served under; `needs` are the engines it calls, and what it
    calls of them.

    `kind` is the name without K and budget. `k`, `budget` and `votes` are None where they mean nothing to the
    policy. `decodes_many`: it takes a place for each of its decodes itself. `takes_penalties`: its output is decoded
    plainly from end to end, and nothing is decided by the probabilities that penalties change. `scored_by` is the
    engine whose log-probabilities the output has, where one model alone writes it, else None."""

    name: str
    needs: Needs
    k: int | None = None
    budget: float | None = None
    votes: int | None = None
    decodes_many: ClassVar[bool] = False
    takes_penalties: ClassVar[bool] = False
    scored_by: str | None = None

    @property
    def kind(self) -> str:
        return self.name

    @abstractmethod
    def decode(self, engines: Engines, request: Request) -> AsyncIterator[Event]: ...


@runtime_checkable
class Deciding(Protocol):
    """A policy whose scorer can be asked about one state."""

    async def decide(self, engines: Engines, request: Request) -> tuple[Decision, bool, dict[str, Usage]]:
        """What it would choose as the next token behind the prompt, whether its trigger fires there, and the cost."""
        ...


#: Takes the likeliest token at every step.
GREEDY = SamplerSettings()


def sampling(
    sampler: SamplerSettings,
    request: Request,
    max_tokens: int,
    seed: int | None = None,
    first_step: int = 0,
    support: int = 0,
) -> Sampling:
    """An engine's settings for up to `max_tokens` tokens of `request` from step `first_step` on, drawn as `sampler`
    says unless the request says otherwise."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=sampler.temperature if request.temperature is None else request.temperature,
        top_p=sampler.top_p if request.top_p is None else request.top_p,
        top_k=sampler.top_k if request.top_k is None else request.top_k,
        min_p=0.0 if request.min_p is None else request.min_p,
        penalties=request.penalties,
        seed=request.seed if seed is None else seed,
        first_step=first_step,
        stop=request.stop,
        support=support,
    )


async def drafting(
    request: Request, call: Callable[[Tell | None], Coroutine[Any, Any, Draft]]
) -> AsyncGenerator[Written | Draft]:
    """What one call writes, then its draft: as it is written where the request is live, else in one part."""
    if request.live:
        async with aclosing(told(call)) as parts:
            async for part in parts:
                yield part
    else:
        draft = await call(None)
        yield Written(draft.ids, draft.support, draft.decisions)
        yield draft


async def one_draft(
    request: Request, engine: str, source: Source, call: Callable[[Tell | None], Coroutine[Any, Any, Draft]]
) -> AsyncGenerator[Event]:
    """The events of a policy that is one call to the engine of that name."""
    async with aclosing(drafting(request, call)) as parts:
        async for part in parts:
            if isinstance(part, Draft):
                yield Done(part.finish, {engine: part.usage})
            else:
                yield Span(part.ids, source, part.support)
                for decision in part.decisions:
                    yield decision


async def check_fits(engines: Engines, names: Iterable[str], request: Request) -> None:
    """Refuse at the start what a policy of many calls would only find out halfway.

    Raises ContextOverflow where the prompt and `max_tokens` exceed an engine's context."""
    needed = len(request.prompt) + request.max_tokens
    for name in names:
        context = (await engines[name].card()).context
        if needed > context:
            raise ContextOverflow(
                f"the prompt's {len(request.prompt)} tokens and {request.max_tokens} more do not fit the "
                f"{context} tokens of {name}; shorten the prompt or lower max_tokens"
            )


@dataclass
class Decoded:
    """A whole decode, gathered."""

    ids: list[int]
    finish: Finish
    usage: dict[str, Usage]
    spans: list[Span]
    decisions: list[Decision]
    samples: list[list[int]]


async def gather(events: AsyncIterator[Event]) -> Decoded:
    """Run a policy to its end and collect what it yielded."""
    out = Decoded([], "length", {}, [], [], [])
    async for event in events:
        if isinstance(event, Span):
            out.spans.append(event)
            out.ids.extend(event.ids)
        elif isinstance(event, Decision):
            out.decisions.append(event)
        else:
            out.finish, out.usage, out.samples = event.finish, event.usage, event.samples
    return out


async def all_of(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What the calls return, run at once; where one fails the others are cancelled, for nobody waits for them any
    more."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
