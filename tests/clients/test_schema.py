"""schemathesis over HTTP: whatever is asked, the gateway answers as its OpenAPI document says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from gateway_alone import Alone
from processes import free_port
from running import run_client

from s2t_models.hosting import host
from s2t_models.recipe import load_recipe

pytestmark = pytest.mark.clients
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
MODELS = ["greedy", "sample", "maj@4", "llm", "s2t", "no-such-model"]
EXAMPLES = 700  # of an operation at most; those without a body have few
REQUESTS = 5000


@pytest.fixture
def gateway(recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a gateway whose engines cost nothing."""
    port = free_port()
    app = Alone(host(load_recipe(recipe_path)), monkeypatch).app
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_the_document_is_true(gateway: str, tmp_path: Path):
    """`model` is any text in the document; made-up names would be answered with 404 and reach nothing."""
    document = httpx.get(f"{gateway}/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"type": "string", "enum": MODELS}
    written = tmp_path / "openapi.json"
    written.write_text(json.dumps(document))
    said = run_client(
        tmp_path,
        *("schemathesis", "run", str(written), "--url", gateway),
        *("--checks", ",".join(CHECKS), "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES)),
        *("--seed", "0", "--generation-database", "none", "--request-timeout", "60", "--suppress-health-check", "all"),
        *("--continue-on-failure", "--no-color"),
    )
    generated = re.search(r"(\d[\d,]*) generated", said)
    assert generated, said
    assert int(generated[1].replace(",", "")) >= REQUESTS, said
