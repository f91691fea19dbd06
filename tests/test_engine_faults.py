"""What the torch engine does where its device fails: it ends and says so; want of memory costs no more than a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference_engine import card, encode, tiny_pair

from s2t_models.engines.contract import EngineDied, Sampling
from s2t_models.engines.torch import engine as torch_engine
from s2t_models.engines.torch.engine import TorchEngine

SICK = "CUDA error: an illegal memory access was encountered"
#: For two slots. The second waits until the first has been read.
PROMPTS = [encode(text) for text in ("8+5=", "8+5=", "7+2=", "1+9=")]


@pytest.fixture
def engine() -> Iterator[TorchEngine]:
    engine = TorchEngine(tiny_pair().slm, card("slm"), slots=2)
    yield engine
    engine.close()


def failing(work: Callable[..., Any], error: Exception, calls: range) -> Callable[..., Any]:
    """`work`, but for those of its calls, numbered from 0."""
    count = iter(range(1000))

    def fails(*arguments: Any) -> Any:
        if next(count) in calls:
            raise error
        return work(*arguments)

    return fails


async def ask(engine: TorchEngine) -> list[Any]:
    async with asyncio.timeout(60):
        calls = (engine.generate(prompt, Sampling(max_tokens=4)) for prompt in PROMPTS)
        return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("where", ["forward", "what is read of it", "a slot's copy"])
def test_a_device_that_fails_ends_the_engine_and_all_its_calls(
    engine: TorchEngine, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, later = torch.AcceleratorError(SICK), range(1, 1000)
    if where == "forward":
        monkeypatch.setattr(engine._slots, "forward", failing(engine._slots.forward, error, later))
    elif where == "a slot's copy":
        monkeypatch.setattr(engine._free, "take", failing(engine._free.take, error, later))
    else:

        def reads(*_: Any) -> Iterator[Any]:
            yield torch_engine.Feed(0, PROMPTS[0], Sampling(4), step=0)
            raise error

        monkeypatch.setattr(torch_engine.calls, "generate", reads)
    for outcome in asyncio.run(ask(engine)):
        assert isinstance(outcome, EngineDied)
        assert SICK in str(outcome)
    for later_call in (engine.generate(PROMPTS[0], Sampling(1)), engine.check_health()):
        with pytest.raises(EngineDied, match=r"slm: the engine's thread has ended .AcceleratorError: CUDA error"):
            asyncio.run(later_call)
    engine._thread.join(10)
    assert not engine._thread.is_alive()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no room"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_want_of_memory_costs_the_calls_of_one_forward(
    engine: TorchEngine, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine._slots, "forward", failing(engine._slots.forward, error, range(1)))
    outcomes = asyncio.run(ask(engine))
    assert [outcome is error for outcome in outcomes] == [True, False, True, False]
    assert [len(outcomes[i].ids) for i in (1, 3)] == [4, 4]
    asyncio.run(engine.check_health())
