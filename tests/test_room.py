"""What gateways say of their room, and Serve's proxy refusing by it: at once, and nothing that would be let in."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from asgi import error_of
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import ASGIApp

from s2t_models.settings import ServingSettings
from serving import metrics, room
from serving.admission import Admission, Busy
from serving.errors import failed, overloaded
from serving.front import Rules, ruled
from serving.keys import Keys
from serving.proxy import ProxyFront
from serving.room import Room, Rooms

PATH = "/v1/chat/completions"


class Doing:
    """A gateway whose requests each take a place until `held` is set, or as many turns of the loop as are drawn."""

    def __init__(self, places: int, most_waiting: int, draw: random.Random | None = None, **settings: Any) -> None:
        self.admission = Admission({"slm": places}, most_waiting)
        self.held, self.draw, self.asked = asyncio.Event(), draw, 0
        self.app = ruled(self._answer, Rules(ServingSettings.model_validate(settings), Keys(), self.admission))

    async def _answer(self, scope, receive, send) -> None:
        self.asked += 1
        try:
            self.admission.check()
        except Busy as error:
            await failed(overloaded(error.retry_after))(scope, receive, send)
            return
        async with self.admission.place(str(self.asked), ["slm"]):
            if scope["query_string"] == b"streamed":
                await StreamingResponse(self._parts(), media_type="text/event-stream")(scope, receive, send)
                return
            await self._decode()
            if scope["query_string"] == b"fails":
                raise RuntimeError("on purpose")
        await JSONResponse({})(scope, receive, send)

    async def _parts(self):
        yield "begun"
        await self._decode()

    async def _decode(self) -> None:
        if self.draw is None:
            await self.held.wait()
        else:
            for _ in range(self.draw.randrange(20)):
                await asyncio.sleep(0)


def clients(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


def run(story: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(limited())


async def begun(client: httpx.AsyncClient, count: int, path: str = PATH) -> list[asyncio.Task[httpx.Response]]:
    """So many requests, each as far as it comes by itself."""
    tasks = [asyncio.ensure_future(client.post(path)) for _ in range(count)]
    await asyncio.sleep(0.01)
    return tasks


async def full(client: httpx.AsyncClient, count: int, path: str = PATH) -> list[asyncio.Task[httpx.Response]]:
    """So many requests, and one more that a gateway refuses, with which the proxy is told."""
    tasks = await begun(client, count, path)
    assert (await client.post(PATH)).status_code == 429
    return tasks


def test_one_too_many_is_refused_unread_and_without_asking_a_gateway():
    async def body():
        raise AssertionError("it is not read")
        yield b""

    async def story() -> None:
        gateway = Doing(places=1, most_waiting=2)
        async with clients(ProxyFront(gateway.app)) as client:
            tasks = await full(client, 3)
            refused = await client.post(PATH, content=body(), headers={"x-request-id": "mine"})
            assert (refused.status_code, error_of(refused)["code"]) == (429, "overloaded")
            assert refused.headers["x-request-id"] == "mine"
            assert int(refused.headers["retry-after"]) >= 1
            assert gateway.asked == 4
            gateway.held.set()
            answers = [await task for task in tasks] + [await client.post(PATH)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert not any(room.HEADER.decode() in answer.headers for answer in [refused, *answers])

    run(story)


@pytest.mark.parametrize("query", ["", "?streamed"])
def test_nothing_is_refused_that_the_gateway_would_have_let_in(query: str):
    async def story() -> None:
        draw = random.Random(0)
        gateway, refused = Doing(places=4, most_waiting=3, draw=draw), 0

        async def watched(scope, receive, send) -> None:
            before = gateway.asked

            async def noted(message) -> None:
                nonlocal refused
                if message.get("status") == 429 and gateway.asked == before:
                    assert gateway.admission.waiting >= 3
                    refused += 1
                await send(message)

            await front(scope, receive, noted)

        front = ProxyFront(gateway.app)
        async with clients(watched) as client:
            tasks = []
            for _ in range(1000):
                tasks += [asyncio.ensure_future(client.post(PATH + query)) for _ in range(draw.randrange(3))]
                for _ in range(draw.randrange(12)):
                    await asyncio.sleep(0)
            statuses = [(await task).status_code for task in tasks]
        assert set(statuses) == {200, 429}
        assert refused > statuses.count(429) / 2

    run(story)


def test_whoever_has_its_answer_or_goes_away_makes_room():
    async def story() -> None:
        gateway = Doing(places=2, most_waiting=1)
        async with clients(ProxyFront(gateway.app)) as client:
            for path in (PATH, f"{PATH}?fails"):
                tasks = await full(client, 3, path)
                asked = gateway.asked
                tasks[0].cancel()
                tasks += await begun(client, 1)
                assert gateway.asked == asked + 1
                gateway.held.set()
                await asyncio.gather(*tasks, return_exceptions=True)
                gateway.held.clear()
            # A stream that has begun is an answer.
            tasks = await full(client, 3, f"{PATH}?streamed")
            asked = gateway.asked
            assert (await client.post(PATH)).status_code == 429
            assert gateway.asked == asked
            gateway.held.set()
            assert {(await task).text for task in tasks} == {"begun"}

    run(story)


def test_what_decodes_nothing_is_never_refused_by_the_proxy():
    async def story() -> None:
        gateway = Doing(places=1, most_waiting=1)
        async with clients(ProxyFront(gateway.app)) as client:
            await full(client, 2)
            for number, asks in enumerate(
                (
                    client.get("/health"),
                    client.get("/v1/models"),
                    client.post("/other/v1/chat/completions"),
                    # Its answer may be read by a page only where the gateway says so.
                    client.post(PATH, headers={"origin": "https://a.org"}),
                ),
                4,
            ):
                await asks
                assert gateway.asked == number

    run(story)


def test_a_gateway_is_taken_by_its_word_for_a_short_time(monkeypatch: pytest.MonkeyPatch):
    async def story() -> None:
        gateway = Doing(places=1, most_waiting=1)
        async with clients(ProxyFront(gateway.app)) as client:
            await full(client, 2)
            for fresh_s, asked in ((60.0, 3), (0.0, 4), (60.0, 4)):
                monkeypatch.setattr(room, "FRESH_S", fresh_s)
                assert (await client.post(PATH)).status_code == 429
                assert gateway.asked == asked

    run(story)


def test_of_several_gateways_all_have_to_be_full():
    async def story() -> None:
        gateways = [Doing(places=1, most_waiting=1, gateway_replicas=2) for _ in range(2)]
        turn = 0

        async def either(scope, receive, send) -> None:
            await gateways[turn].app(scope, receive, send)

        async with clients(ProxyFront(either)) as client:
            for turn, asked in enumerate((4, 3)):
                await full(client, 2)
                assert (await client.post(PATH)).status_code == 429
                assert gateways[turn].asked == asked

    run(story)


def test_a_gateway_that_was_replaced_has_no_say():
    rooms = Rooms(unanswered=2)
    rooms.note(Room("old", gateways=1, limit=5, retry_after=1))
    assert rooms.full() is None
    rooms.note(Room("new", gateways=1, limit=2, retry_after=7))
    assert rooms.full() == Room("new", 1, 2, 7)


def test_a_gateway_counts_what_the_proxy_has_refused_and_nobody_else():
    def counted() -> float:
        return metrics.REGISTRY.get_sample_value("s2t_refused_total", {"reason": "full"}) or 0.0

    async def story() -> None:
        before = counted()
        gateway = Doing(places=1, most_waiting=1)
        async with clients(ProxyFront(gateway.app)) as client:
            await full(client, 2)
            for _ in range(5):
                await client.post(PATH)
            assert counted() == before
            for _ in range(2):
                await client.get("/metrics", headers={room.REFUSED.decode(): "1000"})
                assert counted() == before + 5
        # Without the front in Serve's proxy, clients say what they like.
        async with clients(gateway.app) as client:
            for said in ("many", "-1", "9" * 30):
                assert (await client.get("/health", headers={room.REFUSED.decode(): said})).status_code == 429
        assert counted() == before + 5

    run(story)
