"""The gateway's queue: places go round fairly, what cannot wait is refused, and nothing is lost by those who leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from serving import admission as admission_module
from serving.admission import Admission, Busy


def test_no_more_decode_at_once_than_there_are_places():
    async def scenario() -> int:
        admission, running, most = Admission({"slm": 4}, 100), 0, 0

        async def decode(request: str) -> None:
            nonlocal running, most
            async with admission.place(request, ["slm"]):
                running += 1
                most = max(most, running)
                await asyncio.sleep(0)
                running -= 1

        await asyncio.gather(*(decode(f"r{i}") for i in range(40)))
        return most

    assert asyncio.run(scenario()) == 4


def order_of(asks: Callable[[Callable[[str], Awaitable[None]]], Awaitable[None]], places: int) -> list[str]:
    """The order in which decodes end, each of which takes one turn of the loop."""

    async def scenario() -> list[str]:
        admission, ended = Admission({"slm": places}, 1000), []

        async def decode(request: str) -> None:
            async with admission.place(request, ["slm"]):
                await asyncio.sleep(0.001)
                ended.append(request)

        await asks(decode)
        return ended

    return asyncio.run(scenario())


def test_a_request_of_many_samples_leaves_room_for_the_next():
    async def asks(decode: Callable[[str], Awaitable[None]]) -> None:
        many = [asyncio.ensure_future(decode("many")) for _ in range(128)]
        await asyncio.sleep(0)
        await decode("one")
        await asyncio.gather(*many)

    assert order_of(asks, 8).index("one") <= 8


def test_half_of_an_engine_is_left_to_others():
    async def scenario() -> None:
        admission = Admission({"slm": 8}, 100)
        held = asyncio.Event()
        running = 0

        async def decode() -> None:
            nonlocal running
            async with admission.place("many", ["slm"]):
                running += 1
                await held.wait()

        many = [asyncio.ensure_future(decode()) for _ in range(128)]
        await asyncio.sleep(0.01)
        assert running == 4
        async with asyncio.timeout(1), admission.place("one", ["slm"]):
            assert running == 4
        held.set()
        await asyncio.gather(*many)

    asyncio.run(scenario())


def test_a_quarter_has_to_do_where_others_have_asked_lately(monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        admission = Admission({"slm": 16}, 100)
        endings: list[asyncio.Event] = []

        async def decode() -> None:
            async with admission.place("many", ["slm"]):
                endings.append(asyncio.Event())
                await endings[-1].wait()

        async def end(count: int) -> int:
            """So many decodes end; returns how many run then."""
            for ending in [ending for ending in endings if not ending.is_set()][:count]:
                ending.set()
            await asyncio.sleep(0.01)
            return sum(not ending.is_set() for ending in endings)

        many = [asyncio.ensure_future(decode()) for _ in range(60)]
        assert await end(0) == 8
        async with admission.place("one", ["slm"]):
            pass
        assert [await end(1) for _ in range(6)] == [7, 6, 5, 4, 4, 4]
        monkeypatch.setattr(admission_module, "LATELY_S", 0.0)
        assert await end(1) == 8
        while not all(task.done() for task in many):
            await end(8)

    monkeypatch.setattr(admission_module, "LATELY_S", 60.0)
    asyncio.run(scenario())


def test_requests_of_many_samples_take_turns():
    async def asks(decode: Callable[[str], Awaitable[None]]) -> None:
        first = [asyncio.ensure_future(decode("first")) for _ in range(32)]
        await asyncio.sleep(0)
        second = [asyncio.ensure_future(decode("second")) for _ in range(32)]
        await asyncio.gather(*first, *second)

    ended = order_of(asks, 4)
    assert 12 <= ended[:32].count("second") <= 20


def test_a_later_request_does_not_wait_for_all_samples_of_two_earlier_ones():
    async def asks(decode: Callable[[str], Awaitable[None]]) -> None:
        waiting = []
        for request in ("first", "second", "third"):
            waiting += [asyncio.ensure_future(decode(request)) for _ in range(32)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)

    assert order_of(asks, 8)[:32].count("third") >= 6


def test_too_many_are_refused_at_once_and_told_when_to_come_again():
    async def scenario() -> None:
        admission = Admission({"slm": 2}, 3)
        admission.check()
        held = asyncio.Event()

        async def decode(request: str) -> None:
            async with admission.place(request, ["slm"]):
                await held.wait()

        tasks = [asyncio.ensure_future(decode(f"r{i}")) for i in range(5)]
        await asyncio.sleep(0)
        assert admission.waiting == 3
        with pytest.raises(Busy) as refusal:
            admission.check()
        assert refusal.value.retry_after >= 1
        tasks[-1].cancel()
        await asyncio.sleep(0)
        admission.check()
        held.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert admission.waiting == 0

    asyncio.run(scenario())


def test_whoever_leaves_gives_back_what_it_held():
    async def scenario() -> None:
        admission = Admission({"slm": 1, "teacher": 1}, 10)

        async def decode(request: str, *engines: str) -> None:
            async with admission.place(request, engines):
                await asyncio.sleep(10)

        first = asyncio.ensure_future(decode("first", "slm"))
        await asyncio.sleep(0)
        waiting = asyncio.ensure_future(decode("waiting", "slm", "teacher"))
        leaving = asyncio.ensure_future(decode("leaving", "slm"))
        await asyncio.sleep(0)
        # Given its place and cancelled in one turn of the loop.
        first.cancel()
        leaving.cancel()
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(first, waiting, leaving, return_exceptions=True)
        async with asyncio.timeout(1), admission.place("last", ["slm", "teacher"]):
            pass

    asyncio.run(scenario())


def test_what_was_kept_for_one_that_leaves_is_given_to_the_next():
    async def scenario() -> None:
        admission = Admission({"slm": 1, "teacher": 1}, 10)
        async with admission.place("busy", ["teacher"]):
            both = asyncio.ensure_future(admission.place("both", ["slm", "teacher"]).__aenter__())
            await asyncio.sleep(0)
            next_one = asyncio.ensure_future(admission.place("next", ["slm"]).__aenter__())
            await asyncio.sleep(0)
            assert not next_one.done()
            both.cancel()
            async with asyncio.timeout(1):
                await next_one

    asyncio.run(scenario())


def test_who_needs_two_engines_is_not_passed_for_ever():
    async def asks(admission: Admission) -> list[str]:
        ended: list[str] = []

        async def decode(request: str, *engines: str) -> None:
            async with admission.place(request, engines):
                await asyncio.sleep(0.001)
                ended.append(request)

        busy = [asyncio.ensure_future(decode(f"slm{i}", "slm")) for i in range(3)]
        busy += [asyncio.ensure_future(decode(f"teacher{i}", "teacher")) for i in range(3)]
        await asyncio.sleep(0)
        both = asyncio.ensure_future(decode("both", "slm", "teacher"))
        await asyncio.sleep(0)
        later = [asyncio.ensure_future(decode(f"later{i}", "slm")) for i in range(20)]
        await asyncio.gather(*busy, both, *later)
        return ended

    ended = asyncio.run(asks(Admission({"slm": 1, "teacher": 1}, 100)))
    assert ended.index("both") < 12
