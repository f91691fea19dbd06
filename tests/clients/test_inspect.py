"""inspect_ai over HTTP: its tasks run, by the Responses API and by chat completions, whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import Reference, Served, run_client

pytestmark = pytest.mark.clients


@pytest.mark.parametrize(
    ("model", "settings", "asked"),
    [
        # It first asks whether there are summaries of reasoning, and is told that there are none.
        ("openai/greedy", (), {("/v1/responses", 400), ("/v1/responses", 200)}),
        ("openai/greedy", ("streaming=true",), {("/v1/responses", 400), ("/v1/responses", 200)}),
        ("openai-api/s2t/greedy", (), {("/v1/chat/completions", 200)}),
        ("openai-api/s2t/greedy", ("stream=true",), {("/v1/chat/completions", 200)}),
    ],
    ids=["responses", "responses-streamed", "chat", "chat-streamed"],
)
def test_a_task_is_answered(
    served: Served,
    reference: Reference,
    problems: list[Any],
    tmp_path: Path,
    model: str,
    settings: tuple[str, ...],
    asked: set[tuple[str, int]],
):
    run_client(
        tmp_path,
        *("inspect", "eval", "tests/clients/inspect_problems.py"),
        *("--model", model, "--model-base-url", f"{served.url}/v1"),
        *(part for setting in settings for part in ("-M", setting)),
        *("--log-dir", str(tmp_path / "logs"), "--log-format", "json", "--display", "plain"),
        OPENAI_API_KEY="none",
        S2T_API_KEY="none",
    )
    (log,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json"))
    assert log["status"] == "success"
    assert len(log["samples"]) == len(problems)
    for sample in log["samples"]:
        assert sample["output"]["completion"] == reference.answer(sample["input"])
        assert sample["output"]["choices"][0]["stop_reason"] == "stop"
    assert {sample["scores"]["pattern"]["value"] for sample in log["samples"]} == {"C", "I"}
    assert served.asked() == asked
