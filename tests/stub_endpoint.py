"""A small HTTP server that speaks the endpoint's protocol for tests of its clients: it counts what it is
asked, and fails on demand. It holds no model: its answers follow from (model, question).
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NEEDS = {"llm": ["teacher"], "takeover": ["slm", "teacher"], "s2t": ["slm", "teacher"], "s2t-local": ["s2t-local"]}
#: How often a model is right, in 256ths.
SKILL = {"greedy": 90, "maj@8": 110, "s2t-local": 140, "kd": 150, "s2t": 200, "takeover": 205, "llm": 220}


class Stub(ThreadingHTTPServer):
    """`gold` maps a question to its answer. `fault(body, times asked before)` may give (status, body, headers) instead
    of an answer, or raise ConnectionError to hang up; a body of bytes is sent as it is, and so is one of `pages`, by
    path, with the status in `statuses`. `keys` are those that it was asked with."""

    daemon_threads = True
    # The default of 5 drops connections where this process is slow to accept them, and a dropped one waits for minutes.
    request_queue_size = 1024

    def __init__(self, gold: dict[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.gold = gold
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.pages: dict[str, bytes] = {}
        self.statuses: dict[str, int] = {}
        self.keys: set[str | None] = set()
        self.fault: Callable[[dict[str, Any], int], tuple[int, dict[str, Any] | bytes, dict[str, str]] | None] = (
            lambda body, n: None
        )
        self.delay_s = 0.0
        self.down = False
        self.weights = "w1"
        self.models = [*SKILL, "s2t-local-w0", "s2t@0.05"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up, as one that is stopped does, is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def right(self, model: str, question: str) -> bool:
        draw = hashlib.sha256(f"{question}".encode()).digest()[0]
        return draw < SKILL.get(model, 120)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        model, question = body["model"], body["messages"][-1]["content"]
        gold = self.gold.get(question, "0")
        value = gold if self.right(model, question) else f"{gold}1"
        text = f"So it is \\boxed{{{value}}}."
        engines = NEEDS.get(model, ["slm"])
        usage = {engine: {"prefill": 20, "decode": 5, "leaves": 0, "forwards": 6} for engine in engines}
        decision = {
            "step": 1,
            "value": 0.7,
            "candidates_K": [11, 12, 13],
            "logprobs_K": [-0.4, -1.4, -3.0],
            "scores_K": [0.1, 0.8, 0.1],
            "preferences_K": [0.1, 0.8, 0.1],
            "teacher_K": [0.1, 0.8, 0.1],
            "chosen": 12,
            "argmax": 12 if self.right(model, question) else 14,
        }
        return {
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25},
            "s2t": {
                "usage": usage,
                "seconds": 0.01,
                "models": dict.fromkeys(engines, self.weights),
                "samples": [text, text, "none"] if model.startswith("maj@") else [],
                "decisions": [decision] if model.startswith("s2t") else [],
                "spans": [["slm", 5]],
            },
        }


class Handler(BaseHTTPRequestHandler):
    server: Stub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        if self.server.down:
            self.close_connection = True
        elif self.path in self.server.pages:
            self.reply(self.server.statuses.get(self.path, 200), self.server.pages[self.path])
        elif self.path == "/health":
            engines = {engine: {"weights": self.server.weights} for engine in ("slm", "teacher", "s2t-local")}
            self.reply(200, {"status": "ok", "engines": engines})
        elif self.path == "/v1/models":
            entries = [self.entry(model) for model in self.server.models]
            self.reply(200, {"object": "list", "data": entries})
        else:
            self.reply(404, {"error": {"message": "no such model", "code": "model_not_found"}})

    def entry(self, model: str) -> dict[str, Any]:
        kind, _, budget = model.partition("@")
        votes = int(budget) if kind == "maj" else None
        asks = model.startswith(("s2t", "takeover"))
        return {
            "id": model,
            "created": time.time(),
            "needs": NEEDS.get(model, ["slm"]),
            "kind": model if votes else kind,
            "k": 8 if asks else None,
            "budget": float(budget or 0.1) if asks else None,
            "votes": votes,
        }

    def do_POST(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps([body["model"], body.get("seed"), body["messages"]])
        before = self.server.asked[key]
        self.server.asked[key] += 1
        self.server.bodies.append(body)
        time.sleep(self.server.delay_s)
        try:
            fault = self.server.fault(body, before)
        except ConnectionError:
            self.close_connection = True
            return
        if fault:
            self.reply(*fault)
        else:
            self.server.answered[key] += 1
            self.reply(200, self.server.answer(body))

    def reply(self, status: int, body: dict[str, Any] | bytes, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def stub_endpoint(gold: dict[str, str]) -> Iterator[Stub]:
    server = Stub(gold)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
