"""The embedded pair behind `s2t serve`, for the clients of `.venv-clients`."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from processes import ctrl_c, end, free_port, start, wait_until
from running import HERE, Reference, Served


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    port, log = free_port(), tmp_path_factory.mktemp("served") / "access.jsonl"
    settings = [f"serving.port={port}", f"serving.access_log={log}"]
    process = start(
        *("-m", "pipelines.cli", "serve", "--recipe", "embedded"),
        *(part for setting in settings for part in ("--set", setting)),
    )
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_until(is_ready, process)
        yield Served(url, log)
        ctrl_c(process)
        status, _, said = end(process)
        assert status == 130, said
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def served(pair: Served) -> Served:
    """The endpoint, with an empty access log."""
    pair.access_log.write_text("")
    return pair


@pytest.fixture(scope="session")
def reference(pair: Served) -> Reference:
    engines: dict[str, Any] = httpx.get(f"{pair.url}/health").json()["engines"]
    return Reference(engines["slm"]["masked_ids"])


@pytest.fixture(scope="session")
def problems() -> list[dict[str, Any]]:
    """Made by `s2t_models.embedded.generator`, of its test split."""
    return [json.loads(line) for line in (HERE / "problems.jsonl").read_text().splitlines()]
