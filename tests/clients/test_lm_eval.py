"""lm-evaluation-harness over HTTP: its numbers are those of transformers on the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import HERE, SLM, Reference, Served, run_client

pytestmark = pytest.mark.clients
STOPS = ("}", "\n\n")


def run(model: str, tasks: str, folder: Path, settings: dict[str, Any], *more: str) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task, with what was asked and answered."""
    run_client(
        folder,
        *("lm-eval", "run", "--model", model, "--include_path", str(HERE), "--tasks", tasks),
        *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
        *("--output_path", str(folder / "out"), "--log_samples", *more),
        OPENAI_API_KEY="none",
    )
    logs = {task: next((folder / "out").rglob(f"samples_{task}_*.jsonl")) for task in tasks.split(",")}
    return {task: [json.loads(line) for line in log.read_text().splitlines()] for task, log in logs.items()}


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"tokenized_requests": True}, ("--batch_size", "4")),
        ({"tokenized_requests": False, "num_concurrent": 4}, ()),
    ],
    ids=["ids", "texts"],
)
def test_log_likelihoods_are_those_of_transformers(
    served: Served,
    reference: Reference,
    problems: list[Any],
    tmp_path: Path,
    settings: dict[str, Any],
    more: tuple[str, ...],
):
    endpoint = {"model": "greedy", "base_url": f"{served.url}/v1/completions", "tokenizer": SLM}
    samples = run("local-completions", "s2t_numbers,s2t_text", tmp_path, endpoint | settings, *more)
    encode = reference.tokenizer.encode
    greedy = set()
    for sample in samples["s2t_numbers"]:
        asked = sample["arguments"].values()
        assert len(sample["resps"]) == len(asked) == 4
        for one, [answered] in zip(asked, sample["resps"], strict=True):
            context, whole = encode(one["arg_0"]), encode(one["arg_0"] + one["arg_1"])
            assert whole[: len(context)] == context
            expected, is_greedy = reference.loglikelihood(context, whole[len(context) :])
            assert float(answered[0]) == pytest.approx(expected, abs=1e-3)
            assert (str(answered[1]) == "True") == is_greedy
            greedy.add(is_greedy)
    assert greedy == {True, False}
    for sample in samples["s2t_text"]:
        expected, _ = reference.loglikelihood([reference.tokenizer.eos_token_id], encode(sample["doc"]["solution"]))
        [[answered]] = sample["resps"]
        assert float(answered) == pytest.approx(expected, abs=1e-3)
    assert len(samples["s2t_numbers"]) == len(samples["s2t_text"]) == len(problems)
    assert served.asked() == {("/v1/completions", 200)}


@pytest.mark.parametrize(
    ("model", "path", "settings"),
    [
        ("local-completions", "/v1/completions", {"tokenizer": SLM, "tokenized_requests": True}),
        ("local-chat-completions", "/v1/chat/completions", {"num_concurrent": 4}),
    ],
)
def test_generated_answers_are_those_of_transformers(
    served: Served, reference: Reference, problems: list[Any], tmp_path: Path, model: str, path: str, settings: Any
):
    endpoint = {"model": "greedy", "base_url": served.url + path}
    samples = run(model, "s2t_answers", tmp_path, endpoint | settings, "--apply_chat_template")["s2t_answers"]
    assert len(samples) == len(problems)
    for sample in samples:
        text = reference.answer(sample["doc"]["question"])
        for stop in STOPS:
            text = text.partition(stop)[0]
        assert sample["resps"] == [[text]]
    assert {sample["exact_match"] for sample in samples} == {0.0, 1.0}
    assert served.asked() == {(path, 200)}
