"""Asking a served endpoint many questions at once, on Ray Data.

The answers go to a log that the actors share with the job. This module knows the
OpenAI protocol and its `s2t` extension, nothing of tasks, grading or policies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import ray
import ray.data
from ray.data import ActorPoolStrategy

from pipelines.benchmark.answer_log import Answer, Question
from pipelines.benchmark.endpoint import LONGEST_REPLY, EndpointError, Reply, merge, read_error, read_reply
from pipelines.runtime.records import RecordLog
from s2t_models.errors import UserError, one_line
from s2t_models.storage import Location, StorageError, location
from serving.http import authorization, base_url, is_near

ATTEMPTS = 8
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 20.0
TIMEOUT_S = 1800.0
ACTOR_CONCURRENCY = 64
ROWS_A_BLOCK = 8


class AskingError(UserError):
    """What asks has died; the message is one line."""


class Gone(EndpointError):
    """The endpoint refuses whatever it is asked: not these questions' fault, so no answer to any of them."""


class Refused(Exception):
    """The endpoint will give the same refusal of this question however often it is asked."""

    def __init__(self, status: int, message: str, code: str | None) -> None:
        super().__init__(f"{status}: {message}")
        self.code = code


class Asker:
    """A Ray Data actor: asks its questions concurrently, and tries again where the fault may pass (429, 5xx,
    connection).

    Each row comes back as {"key", "fault", "reason"}: fault is None where the answer is kept, "row" where only this
    question could not be answered, "endpoint" where nothing answers any more; the rest is then not asked; "storage"
    where the answer could not be kept."""

    def __init__(self, endpoint: str, folder: str, concurrency: int, first_delay_s: float, api_key: str) -> None:
        self.url, self.log = base_url(endpoint), RecordLog(location(folder))
        self.headers = authorization(api_key)
        self.concurrency, self.first_delay_s = concurrency, first_delay_s
        self.slots: asyncio.Semaphore | None = None
        self.session: aiohttp.ClientSession | None = None
        self.down: str | None = None

    async def __call__(self, row: Question) -> dict[str, str | None]:
        if self.slots is None or self.session is None:
            self.slots = asyncio.Semaphore(self.concurrency)
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                headers=self.headers,
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, connect=30),
                trust_env=not is_near(self.url),
            )
        async with self.slots:
            if self.down:
                return {"key": row["key"], "fault": "endpoint", "reason": self.down}
            try:
                answer = await self.answer(self.session, row)
                await asyncio.to_thread(self.log.append, answer)
            except StorageError as error:
                return {"key": row["key"], "fault": "storage", "reason": one_line(error)}
            except (EndpointError, aiohttp.ClientError, TimeoutError) as error:
                reason = one_line(error)
                is_gone = isinstance(error, Gone)
                if is_gone or not (isinstance(error, EndpointError) or await self.alive(self.session)):
                    self.down = reason
                return {"key": row["key"], "fault": "endpoint" if self.down else "row", "reason": reason}
        return {"key": row["key"], "fault": None, "reason": None}

    async def answer(self, session: aiohttp.ClientSession, row: Question) -> Answer:
        """All turns of one question. A refusal of the question (400, 413, 422) is an answer with an `error`."""
        messages, later = json.loads(row["messages"]), json.loads(row["turns"])
        extension = {"decisions": True} | ({"options": options} if (options := json.loads(row["options"])) else {})
        body = {key: row[key] for key in ("model", "seed", "max_tokens")} | {"s2t": extension}
        replies: list[Reply] = []
        began = time.perf_counter()
        error, shortened = None, False
        for turn in [None, *later]:
            if turn is not None:
                messages += [{"role": "assistant", "content": replies[-1].text}, {"role": "user", "content": turn}]
            try:
                reply, less = await self.post_fitting(session, body | {"messages": messages})
                replies.append(reply)
                shortened |= less
            except Refused as refusal:
                error = str(refusal)
                break
        finishes = [reply.finish for reply in replies] or ["stop"]
        return {
            "key": row["key"],
            "outputs": [reply.text for reply in replies],
            "finish": "length" if "length" in finishes else finishes[-1],
            "tokens": sum(reply.tokens for reply in replies),
            "s2t": merge([reply.s2t for reply in replies]),
            "seconds": time.perf_counter() - began,
            "error": error,
            "shortened": shortened,
        }

    async def post_fitting(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> tuple[Reply, bool]:
        """One request; where prompt and limit exceed the model's context, again with whatever room the context leaves.
        Says whether that was needed."""
        try:
            return await self.post(session, body), False
        except Refused as refusal:
            if refusal.code != "context_length_exceeded":
                raise
            return await self.post(session, {key: value for key, value in body.items() if key != "max_tokens"}), True

    async def post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Reply:
        """One request, tried up to ATTEMPTS times. Raises Refused, Gone, EndpointError (the status stays bad, or the
        reply makes no sense) or what aiohttp raises."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            wait = min(LONGEST_DELAY_S, self.first_delay_s * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                async with session.post(f"{self.url}/chat/completions", json=body) as response:
                    content = await read_body(response)
                    if response.status == 200:
                        return read_reply(content)
                    message, code = read_error(content.decode(errors="replace"))
                    if response.status in (400, 413, 422):
                        raise Refused(response.status, message, code)
                    if response.status < 500 and response.status not in (408, 425, 429):
                        raise Gone(f"{response.status}: {message}")
                    if last:
                        raise EndpointError(f"{response.status} after {ATTEMPTS} attempts: {message}")
                    with contextlib.suppress(KeyError, ValueError):
                        wait = max(wait, min(LONGEST_DELAY_S, float(response.headers["Retry-After"])))
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError):
                if last:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def alive(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
                return response.status < 500
        except (aiohttp.ClientError, TimeoutError):
            return False


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body. Raises EndpointError where it is longer than LONGEST_REPLY."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(2**16):
        body += chunk
        if len(body) > LONGEST_REPLY:
            raise EndpointError(f"the reply is longer than {LONGEST_REPLY // 1024**2} MiB")
    return bytes(body)


def ask(
    questions: list[Question], endpoint: str, folder: Location, concurrency: int, api_key: str = ""
) -> dict[str, str]:
    """Ask every question of `questions` on Ray Data; answers land in `folder`. Needs a running Ray.

    Returns key -> reason for the questions that could not be answered this time. Raises EndpointError where the
    endpoint stopped answering, StorageError where an answer could not be kept, and AskingError where what asks died:
    what was kept before stays."""
    unanswered: dict[str, str] = {}
    for row in _asked(questions, endpoint, folder, concurrency, api_key):
        if row["fault"] == "endpoint":
            raise EndpointError(
                f"{endpoint} stopped answering ({row['reason']}); what it answered is kept: start it and run the same "
                "command again"
            )
        if row["fault"] == "storage":
            raise StorageError(f"{row['reason']}; the answers before are kept: run the same command again")
        if row["fault"]:
            unanswered[row["key"]] = row["reason"]
    return unanswered


def _asked(
    questions: list[Question], endpoint: str, folder: Location, concurrency: int, api_key: str
) -> Iterator[dict[str, Any]]:
    try:
        yield from _rows(questions, endpoint, folder, concurrency, api_key)
    except ray.exceptions.RayError as error:
        raise AskingError(
            f"asking failed: {one_line(error)}; the answers before are kept: run the same command again"
        ) from error


def _rows(
    questions: list[Question], endpoint: str, folder: Location, concurrency: int, api_key: str
) -> Iterator[dict[str, Any]]:
    actors = -(-concurrency // ACTOR_CONCURRENCY)
    each = -(-concurrency // actors)
    # A small block comes back early and one slow row holds few others up; twice the blocks that fill the slots keep
    # them full.
    calls = 2 * -(-each // ROWS_A_BLOCK)
    rows = ray.data.from_items(questions, override_num_blocks=-(-len(questions) // ROWS_A_BLOCK))
    pool = ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=calls, max_concurrent_calls_per_actor=calls)
    # Asking waits for the network: it takes no CPU that a model could use.
    yield from rows.map(
        Asker,  # type: ignore[arg-type]
        fn_constructor_args=(endpoint, str(folder.resolve()), each, FIRST_DELAY_S, api_key),
        compute=pool,
        num_cpus=0,
    ).iter_rows()
