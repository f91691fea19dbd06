"""A small gateway for tests of the playground: the real page's routes over answers that were written down, streamed as
the endpoint streams them. It holds no model. A test can hold an answer back halfway, let it fail, and see it stopped.
"""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serving.playground.routes import router

Token = tuple[str, str]


def decision(step: int, texts: Sequence[str], slm: Sequence[float], scores: Sequence[float], **given: Any) -> dict:
    """A decision over candidates whose ids are 100, 101, ...; by default the one with the best score is chosen."""
    ids = list(range(100, 100 + len(texts)))
    best = max(range(len(texts)), key=lambda k: scores[k])
    return {
        "step": step,
        "value": 1.25,
        "candidates_K": ids,
        "texts_K": list(texts),
        "logprobs_K": [math.log(p) for p in slm],
        "scores_K": list(scores),
        "preferences_K": list(scores),
        "chosen": ids[best],
        "chosen_text": texts[best],
        "argmax": None,
        "argmax_text": None,
        "teacher_K": None,
    } | given


def words(text: str, source: str = "slm") -> list[Token]:
    """Tokens of one word each, with the space before it."""
    first, *others = text.split(" ")
    return [(first, source), *((f" {word}", source) for word in others)]


_OPENING = words("On Tuesday there are 8 more: 46+8=")
_GREEDY = [*_OPENING, *words("52 marbles. The answer is \\boxed{52}.")]
_LOCAL = [
    *_OPENING,
    ("54", "selected"),
    *words(" marbles. The", "slm")[1:],
    (" bags", "selected"),
    *words(" hold 3*4=12 marbles.\nThe answer is", "slm")[1:],
    (" \\boxed{", "selected"),
    ("49}.", "slm"),
]
_TAKEOVER = [*_OPENING, ("54", "teacher"), *words(" marbles. The answer is \\boxed{54}.")[1:]]
_NASTY = words("So </script><script>document.title='broken'</script><img src=x onerror=document.title='broken'> & done")

#: What each policy answers: its tokens and its decisions.
ANSWERS: dict[str, tuple[list[Token], list[dict]]] = {
    "greedy": (_GREEDY, []),
    "s2t-local": (
        _LOCAL,
        [
            decision(len(_OPENING), ["52", "54", "56"], [0.62, 0.31, 0.02], [0.12, 0.93, 0.05]),
            decision(len(_OPENING) + 3, [" bags", " answer"], [0.71, 0.22], [0.8, 0.4]),
            decision(
                len(_LOCAL) - 2,
                [" 49", " \\boxed{", "\n"],
                [0.5, 0.4, 0.0004],
                [0.3, 0.9, 0.1],
                preferences_K=[0.1, 1.4, -5.0],
            ),
        ],
    ),
    "takeover": (
        _TAKEOVER,
        [
            decision(
                len(_OPENING),
                ["52", "56"],
                [0.62, 0.02],
                [0.1, 0.01],
                teacher_K=[0.1, 0.01],
                chosen=7,
                chosen_text="54",
                argmax=7,
                argmax_text="54",
            )
        ],
    ),
    "s2t@0.05": (_NASTY, [decision(1, [_NASTY[1][0], " <b>"], [0.4, 0.5], [0.9, 0.1])]),
}


class StreamingStub:
    """`held` policies stop after half of their tokens until they are let go; `broken` ones send an error there;
    `refused` ones answer 400. With a `key`, requests have to bring it. `bodies` are the requests, `left` the policies
    whose client went away."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.broken: set[str] = set()
        self.refused: set[str] = set()
        self.key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.left: set[str] = set()
        self.url = ""

    def application(self) -> FastAPI:
        app = FastAPI()
        app.include_router(router)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        return app

    async def models(self, request: Request) -> JSONResponse:
        if refusal := self._refusal(request):
            return refusal
        data = [{"id": name, "object": "model"} for name in ANSWERS]
        return JSONResponse({"object": "list", "data": data, "unavailable": {"r2r": "r2r: router.path is not set"}})

    async def chat(self, request: Request) -> JSONResponse | StreamingResponse:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        if body["model"] in self.refused:
            return _error(400, "messages: this model's context is 512 tokens")
        return StreamingResponse(self._stream(body["model"]), media_type="text/event-stream")

    def _refusal(self, request: Request) -> JSONResponse | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return _error(401, "a key is needed")

    async def _stream(self, policy: str) -> AsyncIterator[str]:
        tokens, decisions = ANSWERS[policy]
        ended = False
        try:
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            for step, token in enumerate(tokens):
                if step == len(tokens) // 2:
                    while policy in self.held:
                        await asyncio.sleep(0.01)
                    if policy in self.broken:
                        yield _event({"error": {"message": "an engine of this policy is not available just now"}})
                        return
                # A decision comes after its token, which the endpoint may do.
                here = [one for one in decisions if one["step"] == step - 1]
                yield _event(
                    {
                        "choices": [{"index": 0, "delta": {"content": token[0]}, "finish_reason": None}],
                        "s2t": {"tokens": [token], "decisions": here},
                    }
                )
                await asyncio.sleep(0.005)
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            yield _event({"choices": [], "usage": {"completion_tokens": len(tokens)}, "s2t": _ending(policy)})
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            if not ended and policy not in self.broken:
                self.left.add(policy)


def _ending(policy: str) -> dict[str, Any]:
    cost = {"prefill": 60, "decode": 30, "leaves": 0, "forwards": 31}
    engines = {"s2t-local": ["s2t-local"], "takeover": ["slm", "teacher"]}.get(policy, ["slm"])
    usage = dict.fromkeys(engines, cost)
    return {"usage": usage, "seed": 7, "seconds": 0.42, "models": dict.fromkeys(engines, "ab" * 32), "samples": []}


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "t", "param": None, "code": None}}, status)


def _event(event: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'chatcmpl-1', 'object': 'chat.completion.chunk', **event})}\n\n"


@contextmanager
def streaming_stub() -> Iterator[StreamingStub]:
    """The stub on a free port, at the root and below /benchmark-x."""
    stub = StreamingStub()
    app = stub.application()
    app.mount("/benchmark-x", stub.application())
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        stub.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield stub
        finally:
            server.should_exit = True
            thread.join()
