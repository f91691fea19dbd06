"""Asking a served endpoint many questions, so that no answer is ever paid for twice.

An answer is written and synced to `ANSWERS/*.jsonl` before it counts as answered; a job that was killed reads
these files and asks only the rest. The actors run on Ray Data, and ANSWERS must lie on storage they share
with the job. They know the OpenAI protocol and its `s2t` extension, nothing of tasks, grading or policies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import ray.data
from ray.data import ActorPoolStrategy

from s2t_models.errors import UserError

ATTEMPTS = 8
FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 20.0
TIMEOUT_S = 1800.0
ACTOR_CONCURRENCY = 64
ROWS_A_BLOCK = 8

#: A question is {"key", "model", "seed", "max_tokens", "messages": JSON, "turns": JSON list of later user
#: texts}.
Question = dict[str, Any]
#: An answer is {"key", "outputs": one text a turn, "finish", "s2t": extension or None, "tokens", "seconds",
#: "error"}.
Answer = dict[str, Any]


class AnswersError(UserError):
    """Kept answers that cannot be read; the message is one line."""


class EndpointError(UserError):
    """The endpoint cannot be asked; the message is one line."""


def read_answers(folder: Path) -> dict[str, Answer]:
    """Every answer kept in `folder`, by key. The torn last line of a killed writer is left out; anything else
    that is not an answer raises AnswersError, naming the file and line."""
    answers: dict[str, Answer] = {}
    for path in sorted(folder.glob("*.jsonl")):
        *lines, torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                answers.setdefault(answer["key"], answer)
            except (ValueError, KeyError, TypeError):
                raise AnswersError(
                    f"{path}:{number}: not an answer; delete that line to ask its question again"
                ) from None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            answer = json.loads(torn)
            answers.setdefault(answer["key"], answer)
    return answers


class AnswerLog:
    """An append-only file of this process's own: an answer is on the disk when `append` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"{uuid.uuid4().hex}.jsonl").open("ab", buffering=0)

    def append(self, answer: Answer) -> None:
        self.file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        os.fsync(self.file.fileno())


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

    Each row comes back as {"key", "fault"}: fault is None where the answer is kept, "row" where only this
    question could not be answered (its text in "reason"), "endpoint" where nothing answers any more; the rest
    is then not asked."""

    def __init__(self, endpoint: str, folder: str, concurrency: int, first_delay_s: float) -> None:
        self.url, self.log = base_url(endpoint), AnswerLog(Path(folder))
        self.concurrency, self.first_delay_s = concurrency, first_delay_s
        self.slots: asyncio.Semaphore | None = None
        self.session: aiohttp.ClientSession | None = None
        self.down: str | None = None

    async def __call__(self, row: Question) -> dict[str, str | None]:
        if self.slots is None or self.session is None:
            self.slots = asyncio.Semaphore(self.concurrency)
            self.session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, connect=30)
            )
        async with self.slots:
            if self.down:
                return {"key": row["key"], "fault": "endpoint", "reason": self.down}
            try:
                self.log.append(await self.answer(self.session, row))
            except (EndpointError, aiohttp.ClientError, TimeoutError) as error:
                reason = " ".join(str(error).split()) or type(error).__name__
                is_gone = isinstance(error, Gone)
                if is_gone or not (isinstance(error, EndpointError) or await self.alive(self.session)):
                    self.down = reason
                return {"key": row["key"], "fault": "endpoint" if self.down else "row", "reason": reason}
        return {"key": row["key"], "fault": None, "reason": None}

    async def answer(self, session: aiohttp.ClientSession, row: Question) -> Answer:
        """All turns of one question. A refusal of the question (400, 413, 422) is an answer with an `error`."""
        messages, later = json.loads(row["messages"]), json.loads(row["turns"])
        body = {key: row[key] for key in ("model", "seed", "max_tokens")} | {"s2t": {"decisions": True}}
        outputs: list[str] = []
        extensions: list[dict[str, Any]] = []
        finish, tokens, began = "stop", 0, time.perf_counter()
        error = None
        for turn in [None, *later]:
            if turn is not None:
                messages += [{"role": "assistant", "content": outputs[-1]}, {"role": "user", "content": turn}]
            try:
                reply = await self.post_fitting(session, body | {"messages": messages})
            except Refused as refusal:
                error = str(refusal)
                break
            choice = reply["choices"][0]
            outputs.append(choice["message"]["content"])
            finish = "length" if "length" in (finish, choice["finish_reason"]) else choice["finish_reason"]
            tokens += reply["usage"]["completion_tokens"]
            extensions.append(reply.get("s2t") or {})
        return {
            "key": row["key"],
            "outputs": outputs,
            "finish": finish,
            "tokens": tokens,
            "s2t": merge(extensions),
            "seconds": time.perf_counter() - began,
            "error": error,
        }

    async def post_fitting(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
        """One request; where prompt and limit exceed the model's context, again with whatever room the
        context leaves."""
        try:
            return await self.post(session, body)
        except Refused as refusal:
            if refusal.code != "context_length_exceeded":
                raise
            return await self.post(session, {key: value for key, value in body.items() if key != "max_tokens"})

    async def post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> dict[str, Any]:
        """One request, tried up to ATTEMPTS times. Raises Refused, Gone, EndpointError (the status stays bad) or
        what aiohttp raises."""
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            wait = min(LONGEST_DELAY_S, self.first_delay_s * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                async with session.post(f"{self.url}/chat/completions", json=body) as response:
                    if response.status == 200:
                        return await response.json()
                    message, code = read_error(await response.text())
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


def merge(extensions: list[dict[str, Any]]) -> dict[str, Any]:
    """The `s2t` objects of a question's turns as one: costs add up, lists follow each other."""
    merged: dict[str, Any] = {}
    for extension in extensions:
        usage = merged.setdefault("usage", {})
        for engine, cost in extension.get("usage", {}).items():
            old = usage.get(engine, {})
            usage[engine] = {kind: old.get(kind, 0) + number for kind, number in cost.items()}
        merged["seconds"] = merged.get("seconds", 0.0) + extension.get("seconds", 0.0)
        merged["models"] = merged.get("models", {}) | extension.get("models", {})
        for name in ("decisions", "spans", "samples"):
            merged[name] = merged.get(name, []) + (extension.get(name) or [])
    if len(extensions) == 1:  # the ids of several turns belong to several prompts
        merged["ids"] = extensions[0].get("ids")
    return merged


def read_error(text: str) -> tuple[str, str | None]:
    """(message in one line of at most 300 characters, code) of an error response."""
    code = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = json.loads(text)["error"]
        text, code = error["message"], error.get("code")
    return " ".join(str(text).split())[:300] or "no message", code


def base_url(endpoint: str) -> str:
    """`http://host:port` and `http://host:port/v1` both name an endpoint; this is the latter form."""
    return endpoint.rstrip("/").removesuffix("/v1") + "/v1"


def served_models(endpoint: str, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What the endpoint says about each model of `names`: its /v1/models entry, and the weight and tokenizer
    hashes of the engines it needs where the server has them (/health). Raises EndpointError where nothing
    answers there, or a model is not served."""
    url = base_url(endpoint)
    try:
        response = httpx.get(f"{url}/models", timeout=60)
        response.raise_for_status()
        entries = {entry["id"]: entry for entry in response.json()["data"]}
        health = httpx.get(f"{url.removesuffix('/v1')}/health", timeout=60)
        engines = health.json().get("engines", {}) if health.is_success else {}
        for name in set(names) - entries.keys():
            # A name with settings of its own (s2t@0.05) need not be listed to be served.
            response = httpx.get(f"{url}/models/{name}", timeout=60)
            if response.is_success:
                entries[name] = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EndpointError(f"{url}: no OpenAI endpoint answers there ({' '.join(str(error).split())[:200]})") from None
    missing = [name for name in names if name not in entries]
    if missing:
        raise EndpointError(f"{url} does not serve {', '.join(missing)}; it serves {', '.join(entries)}")
    return {
        name: {key: value for key, value in entries[name].items() if key != "created"}
        | {"engines": {engine: engines[engine] for engine in entries[name].get("needs", ()) if engine in engines}}
        for name in names
    }


def ask(
    questions: list[Question], endpoint: str, folder: Path, concurrency: int, progress: Callable[[int], None]
) -> dict[str, str]:
    """Ask every question of `questions` on Ray Data; answers land in `folder`. Needs a running Ray.

    Returns key -> reason for the questions that could not be answered this time. Raises EndpointError where
    the endpoint stopped answering: what was answered is kept."""
    unanswered: dict[str, str] = {}
    for done, row in enumerate(_rows(questions, endpoint, folder, concurrency), 1):
        if row["fault"] == "endpoint":
            raise EndpointError(
                f"{endpoint} stopped answering ({row['reason']}); what it answered is kept: start it and run the same command again"
            )
        if row["fault"]:
            unanswered[row["key"]] = row["reason"]
        progress(done)
    return unanswered


def _rows(questions: list[Question], endpoint: str, folder: Path, concurrency: int) -> Iterator[dict[str, Any]]:
    actors = -(-concurrency // ACTOR_CONCURRENCY)
    each = -(-concurrency // actors)
    # A small block comes back early and one slow row holds few others up; twice the blocks that fill the
    # slots keep them full.
    calls = 2 * -(-each // ROWS_A_BLOCK)
    rows = ray.data.from_items(questions, override_num_blocks=-(-len(questions) // ROWS_A_BLOCK))
    pool = ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=calls, max_concurrent_calls_per_actor=calls)
    # Asking waits for the network: it takes no CPU that a model could use.
    yield from rows.map(
        Asker,  # type: ignore[arg-type]
        fn_constructor_args=(endpoint, str(folder.resolve()), each, FIRST_DELAY_S),
        compute=pool,
        num_cpus=0,
    ).iter_rows()
