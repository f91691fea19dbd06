"""A draft over a handle whose replica ends half-way: another replica goes on behind the tokens that are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from reference_engine import END, PROMPT, card, reference_engines, tiny_pair

from s2t_models.engines.contract import NO_PENALTIES, Draft, Engine, Penalties, Sampling, Selection, Written
from s2t_models.engines.telling import joined, told
from s2t_models.settings import CandidateSettings
from serving import engine_deployment
from serving.engine_deployment import RemoteEngine


class Breaking:
    """A streamed draft, a token a part, that breaks off before part `breaks_at`, or before its draft."""

    def __init__(self, engine: Engine, method: str, arguments: tuple[Any, ...], breaks_at: int | None) -> None:
        self._engine, self._method, self._arguments, self._breaks_at = engine, method, arguments, breaks_at

    async def __aiter__(self) -> AsyncIterator[Written | Draft]:
        draft = await getattr(self._engine, self._method)(*self._arguments)
        first = self._arguments[1].first_step
        for t, token in enumerate(draft.ids):
            if t == self._breaks_at:
                raise RayActorError
            decided = [decision for decision in draft.decisions if decision.step == first + t]
            yield Written([token], None, decided)
        if self._breaks_at is not None:
            raise RayActorError
        yield draft

    def cancel(self) -> None:
        pass


class Handle:
    """A handle of an engine whose replicas break off the first drafts as `breaks` says; where `is_gone` there is no
    other replica."""

    def __init__(self, engine: Engine, breaks: list[int], is_gone: bool = False) -> None:
        self._engine, self._breaks, self.calls = engine, breaks, 0
        self.stream = SimpleNamespace(remote=self._stream)
        self.call = SimpleNamespace(remote=lambda method, arguments: getattr(engine, method)(*arguments))
        self.answering = SimpleNamespace(remote=lambda: asyncio.ensure_future(self._answer(is_gone)))

    def options(self, method_name: str | None = None, **_: Any) -> Any:
        return getattr(self, method_name) if method_name else self

    def _stream(self, method: str, arguments: tuple[Any, ...]) -> Breaking:
        self.calls += 1
        return Breaking(self._engine, method, arguments, self._breaks.pop(0) if self._breaks else None)

    async def _answer(self, is_gone: bool) -> Any:
        if is_gone:
            await asyncio.sleep(60)
        return card("slm")


def streamed(handle: Handle, method: str, *arguments: Any) -> tuple[Written, Draft]:
    async def parts() -> list[Any]:
        decode = getattr(RemoteEngine(handle), method)  # type: ignore[arg-type]
        return [part async for part in told(lambda tell: decode(*arguments, tell))]

    *written, draft = asyncio.run(parts())
    return joined(written), draft


@pytest.mark.parametrize("breaks_at", [0, 1, 5, 11])
@pytest.mark.parametrize(
    ("temperature", "penalties"), [(0.0, NO_PENALTIES), (0.8, NO_PENALTIES), (0.8, Penalties(-1.0, -0.5, 1.2))]
)
def test_another_replica_goes_on_with_the_same_text(breaks_at: int, temperature: float, penalties: Penalties):
    engine = reference_engines(tiny_pair())["slm"]
    asked = Sampling(12, temperature=temperature, seed=4, penalties=penalties)
    whole = asyncio.run(engine.generate(PROMPT, asked))
    assert len(whole.ids) == 12
    handle = Handle(engine, [breaks_at])
    written, draft = streamed(handle, "generate", PROMPT, asked)
    assert handle.calls == 2
    assert written.ids == draft.ids == whole.ids
    assert draft.finish == whole.finish
    assert draft.usage.decode == len(whole.ids)


def test_decisions_before_and_after_are_all_there():
    engine = reference_engines(tiny_pair())["s2t-local"]
    asked, selection = Sampling(24, seed=3), Selection(0.3, CandidateSettings(k=4), prior_weight=0.5)
    whole = asyncio.run(engine.generate_selecting(PROMPT, asked, selection))  # type: ignore[attr-defined]
    assert len(whole.decisions) > 1
    at = whole.decisions[0].step + 1
    written, draft = streamed(Handle(engine, [at]), "generate_selecting", PROMPT, asked, selection)
    assert written.ids == draft.ids == whole.ids
    assert written.decisions == draft.decisions == whole.decisions


def test_nothing_is_written_behind_the_end_of_a_text():
    """The end token was told, and the draft that would have said so is lost."""
    engine = reference_engines(tiny_pair())["slm"]
    samplings = [Sampling(40, temperature=1.0, seed=seed) for seed in range(40)]
    drafts = [(asked, asyncio.run(engine.generate(PROMPT, asked))) for asked in samplings]
    asked, whole = next((asked, draft) for asked, draft in drafts if draft.finish == "end")
    handle = Handle(engine, [len(whole.ids)])
    written, draft = streamed(handle, "generate", PROMPT, asked)
    assert handle.calls == 1
    assert written.ids == draft.ids == whole.ids
    assert (draft.ids[-1], draft.finish) == (END, "end")


def test_without_another_replica_the_loss_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_deployment, "ANOTHER_WITHIN_S", 0.05)
    engine = reference_engines(tiny_pair())["slm"]
    with pytest.raises(RayActorError):
        streamed(Handle(engine, [3], is_gone=True), "generate", PROMPT, Sampling(12))
