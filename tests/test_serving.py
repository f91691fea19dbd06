"""The embedded pair behind the OpenAI API: real Serve, real HTTP, the answers those of the models themselves."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from made_up import OTHER, calibration
from processes import ctrl_c, end, free_port, has_child, start, wait_until

from s2t_models import loading
from s2t_models.answers.voting import vote
from s2t_models.embedded.generator import problems
from s2t_models.engines.contract import ContextOverflow, Sampling
from s2t_models.engines.load import load
from s2t_models.hosting import host
from s2t_models.policies import policy
from s2t_models.policies.base import Engines, Request, gather
from s2t_models.recipe import RecipeError, load_recipe
from s2t_models.settings import ModelSettings
from serving import app, port

SLM = ModelSettings(path="embedded:slm", dtype="float32", device="cpu")
TEACHER = ModelSettings(path="embedded:teacher", dtype="float32", device="cpu")
QUESTIONS = [problem.question for problem in problems("calibration", 6, seed=5)]
LONG = 48


@pytest.fixture(scope="module")
def client(endpoint: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(SLM)


def chat(question: str = QUESTIONS[0], model: str = "greedy", **settings: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": LONG} | settings


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def text(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def prompt_ids(tokenizer, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize(("name", "settings"), [("greedy", SLM), ("kd", SLM), ("llm", TEACHER)])
def test_greedy_answers_are_those_of_transformers(client, tokenizer, name: str, settings: ModelSettings):
    model = loading.load_model(settings)
    for question in QUESTIONS[:3]:
        prompt = prompt_ids(tokenizer, question)
        output = model.generate(torch.tensor([prompt]), max_new_tokens=LONG, do_sample=False)[0, len(prompt) :].tolist()
        answer = ask(client, chat(question, name))
        assert text(answer) == tokenizer.decode(output, skip_special_tokens=True)
        ended = output[-1] == tokenizer.eos_token_id
        assert answer["choices"][0]["finish_reason"] == ("stop" if ended else "length")
        assert answer["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(output),
            "total_tokens": len(prompt) + len(output),
        }
        engine = {"greedy": "slm", "kd": "kd", "llm": "teacher"}[name]
        assert answer["s2t"]["usage"][engine]["decode"] == len(output)
        assert answer["s2t"]["models"] == {engine: loading.weights_hash(settings)}


def test_artifacts_side_by_side_answer_as_each_does_alone(
    client, tokenizer, recipe_path: Path, untrained_artifact: Path, other_artifact: Path
):
    made = {"": [f"artifact={untrained_artifact}"], ":other": [f"artifact={other_artifact}", *OTHER]}
    names = ("s2t-local", "s2t-local-k4-w0@0.1", "s2t-local-kl")
    texts: dict[str, list[str]] = {}
    for suffix, settings in made.items():
        hosting = host(load_recipe(recipe_path, settings))
        by_name = {name: load(hosting.engines[name]) for name in ("s2t-local", "teacher")}
        engines = Engines({**by_name}, tokenizer.decode, tokenizer.encode)
        for name in names:
            texts[name + suffix] = []
            for question in QUESTIONS[:2]:
                request = Request(prompt_ids(tokenizer, question), LONG, seed=3)
                decoded = asyncio.run(gather(policy(name, hosting).decode(engines, request)))
                assert decoded.decisions
                answer = ask(client, chat(question, name + suffix, seed=3))
                assert text(answer) == tokenizer.decode(decoded.ids, skip_special_tokens=True)
                assert answer["s2t"]["usage"][f"s2t-local{suffix}"]["decode"]
                texts[name + suffix].append(text(answer))
        for engine in by_name.values():
            engine.close()
    assert all(texts[name] != texts[f"{name}:other"] for name in names)


def test_concurrent_requests_get_the_answers_they_get_alone(client, endpoint: str):
    bodies = [
        chat(question, model, seed=seed)
        for seed, question in enumerate(QUESTIONS)
        for model in ("greedy", "sample", "s2t", "s2t-local", "s2t-local:other", "maj@3")
    ]
    alone = [text(ask(client, body)) for body in bodies]

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=endpoint, timeout=120) as many:
            responses = await asyncio.gather(*(many.post("/chat/completions", json=body) for body in bodies))
            return [text(response.json()) for response in responses]

    assert asyncio.run(together()) == alone


def test_the_seed_decides_the_sample_and_n_takes_the_seeds_that_follow(client):
    def sampled(seed: int, **settings: Any) -> dict[str, Any]:
        return ask(client, chat(model="sample", temperature=1.5, top_p=1.0, seed=seed, **settings))

    texts = [text(sampled(seed)) for seed in (3, 4, 5)]
    assert len(set(texts)) == 3
    assert text(sampled(3)) == texts[0]
    answer = sampled(3, n=3)
    assert [choice["message"]["content"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["s2t"]["usage"]["slm"]["decode"] == answer["usage"]["completion_tokens"]


def test_without_a_seed_every_answer_is_drawn_anew_and_names_its_seed(client):
    def sampled(**settings: Any) -> dict[str, Any]:
        return ask(client, chat(model="sample", temperature=1.5, top_p=1.0, **settings))

    answers = [sampled() for _ in range(4)]
    assert len({text(answer) for answer in answers}) > 1
    seeds = [answer["s2t"]["seed"] for answer in answers]
    assert len(set(seeds)) == 4
    assert text(sampled(seed=seeds[0])) == text(answers[0])
    assert sampled(seed=7)["s2t"]["seed"] == 7
    assert sampled(seed=None)["s2t"]["seed"] not in (None, *seeds)


def test_the_answer_tells_what_the_policy_did_when_asked(client):
    assert ask(client, chat(model="s2t"))["s2t"]["decisions"] is None
    for name in ("s2t", "s2t-local", "s2t-local-kl", "takeover"):
        answer = ask(client, chat(model=name, s2t={"decisions": True}))
        decisions, spans = answer["s2t"]["decisions"], answer["s2t"]["spans"]
        assert decisions
        ids = answer["s2t"]["ids"]
        assert sum(length for _, length in spans) == answer["usage"]["completion_tokens"] == len(ids)
        assert [ids[decision["step"]] for decision in decisions] == [decision["chosen"] for decision in decisions]
        chosen = sum(length for source, length in spans if source != "slm")
        assert chosen == len(decisions)
        if name != "takeover":
            assert all(decision["chosen"] in decision["candidates_K"] for decision in decisions)
    votes = ask(client, chat(model="maj@3"))["s2t"]["samples"]
    assert len(votes) == 3


def test_votes_are_by_letter_where_the_request_carries_options(client):
    for options in ([], ["eggs", "12", "pens"]):
        answer = ask(client, chat(model="maj@5", temperature=1.5, s2t={"options": options}))
        samples = answer["s2t"]["samples"]
        assert text(answer) == samples[vote(samples, options)]
    refused = client.post("/chat/completions", json=chat(s2t={"options": ["x"] * 27}))
    assert refused.status_code == 400
    assert "s2t.options" in refused.json()["error"]["message"]


def test_a_stop_string_ends_the_text(client):
    whole = text(ask(client, chat()))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    answer = ask(client, chat(stop=["never in it", stop]))
    assert text(answer) == whole[: whole.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    # Decoding stops with the token that completes it.
    written = answer["usage"]["completion_tokens"]
    assert answer["s2t"]["usage"]["slm"]["decode"] == written < LONG
    assert ask(client, chat(stop=stop, max_tokens=written - 1))["choices"][0]["finish_reason"] == "length"


def test_penalties_change_the_text_and_the_repetition_penalty_is_transformers(client, tokenizer):
    plain, prompt = text(ask(client, chat(QUESTIONS[0]))), prompt_ids(tokenizer, QUESTIONS[0])
    for name in ("presence_penalty", "frequency_penalty"):
        assert text(ask(client, chat(QUESTIONS[0], **{name: 1.5}))) != plain
        assert text(ask(client, chat(QUESTIONS[0], **{name: 0}))) == plain
    expected = loading.load_model(SLM).generate(
        torch.tensor([prompt]), max_new_tokens=LONG, do_sample=False, repetition_penalty=1.3
    )[0, len(prompt) :]
    answered = text(ask(client, chat(QUESTIONS[0], repetition_penalty=1.3)))
    assert answered == tokenizer.decode(expected, skip_special_tokens=True) != plain


def test_completions_take_a_text_or_token_ids(client, tokenizer):
    ids = prompt_ids(tokenizer, QUESTIONS[1])
    expected = text(ask(client, chat(QUESTIONS[1])))
    for prompt in (ids, tokenizer.decode(ids)):
        response = client.post("/completions", json={"model": "greedy", "prompt": prompt, "max_tokens": LONG})
        assert response.json()["choices"][0]["text"] == expected
    few = client.post("/completions", json={"model": "greedy", "prompt": ids}).json()
    assert few["usage"]["completion_tokens"] == 16, "OpenAI's default"


def test_the_openai_client(endpoint: str):
    client = openai.OpenAI(base_url=endpoint, api_key="none", max_retries=0)
    names = [model.id for model in client.models.list()]
    assert {"greedy", "sample", "maj@8", "llm", "takeover", "s2t", "s2t-local", "s2t-local-w0", "kd"} <= set(names)
    assert client.models.retrieve("maj@5").id == "maj@5"
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    answer = client.chat.completions.create(model="greedy", messages=messages, max_completion_tokens=5, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    with pytest.raises(openai.NotFoundError, match="models here: greedy"):
        client.chat.completions.create(model="gpt", messages=messages)
    stream = client.chat.completions.create(
        model="greedy", messages=messages, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == answer.choices[0].finish_reason
    assert last.usage == answer.usage
    replayed = [*messages, answer.choices[0].message, {"role": "user", "content": "And then?"}]
    assert client.chat.completions.create(model="greedy", messages=replayed, max_tokens=2).usage
    assert client.chat.completions.parse(model="llm", messages=messages, stop=".").choices[0].message.content


def test_health_and_models_say_what_is_served(client, endpoint: str):
    entries = {entry["id"]: entry for entry in client.get("/models").json()["data"]}
    assert entries["s2t"]["needs"] == ["slm", "teacher"]
    assert entries["s2t-local"]["needs"] == ["s2t-local"]
    assert (entries["s2t"]["kind"], entries["s2t"]["k"], entries["s2t"]["budget"]) == ("s2t", 8, 0.1)
    unavailable = client.get("/models").json()["unavailable"]
    none = "s2t-local-entropy:other: no entropy threshold for budget 0.1; calibrated budgets: none"
    assert unavailable["s2t-local-entropy:other"].startswith(none)
    assert unavailable["r2r"] == "r2r: router.path is not set; `s2t distil --objective router` trains one"
    for name in ("distil", "tsd-kd"):
        assert unavailable[name] == f"{name} needs the engine {name}, which is not served here"
    assert unavailable.keys() == {"s2t-local-entropy:other", "r2r", "distil", "tsd-kd"}
    for name in ("s2t-local:other", "s2t-local-w0:other", "s2t-local-kl:other", "s2t-local-random:other"):
        assert "s2t-local:other" in entries[name]["needs"]
    other = client.get("/models/s2t-local-k4@0.1:other").json()
    assert (other["kind"], other["k"], other["budget"]) == ("s2t-local:other", 4, 0.1)
    selection = other["settings"]["selection"]
    assert (selection["threshold"], selection["prior_weight"], selection["temperature"]) == (-0.1, 0.5, 0.2)
    engines = httpx.get(endpoint.removesuffix("/v1") + "/health").json()["engines"]
    assert engines["slm"]["weights"] == loading.weights_hash(SLM)
    assert set(engines) == {"slm", "teacher", "s2t-local", "s2t-local:other", "kd"}
    assert engines["s2t-local:other"]["weights"] != engines["s2t-local"]["weights"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "words"),
    [
        (chat(model="nope"), 404, "model", "model_not_found", "models here: greedy, sample"),
        (chat(model="s2t-local:new"), 404, "model", "model_not_found", "there are other, as in s2t-local@0.05:other"),
        (chat(model="s2t@0.33"), 404, "model", "model_not_found", "no kl threshold for budget 0.33"),
        (chat(tools=[{"type": "function"}]), 400, "tools", "invalid_value", "not supported here"),
        (chat(response_format={"type": "json_object"}), 400, "response_format", "invalid_value", "not supported"),
        *(
            (chat(model=model, frequency_penalty=0.5), 400, "frequency_penalty", "invalid_value", f"{model} takes no")
            for model in ("takeover", "s2t", "s2t-random", "s2t-local", "s2t-local-kl", "multiplex")
        ),
        (chat(model="s2t", presence_penalty=1), 400, "presence_penalty", "invalid_value", "greedy, sample, llm"),
        (chat(presence_penalty=2.5), 400, "presence_penalty", "invalid_value", "less than or equal to 2"),
        (chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value", "greater than 0"),
        (chat(model="s2t", logprobs=True), 400, "logprobs", "invalid_value", "greedy, sample, llm, llm-sample, kd"),
        (chat(top_logprobs=2), 400, "top_logprobs", "invalid_value", "send logprobs: true"),
        (chat(max_tokens="5"), 400, "max_tokens", "invalid_value", "valid integer"),
        (chat(max_tokens=0), 400, "max_tokens", "invalid_value", "greater than or equal to 1"),
        (chat(temperature="hot"), 400, "temperature", "invalid_value", "valid number"),
        (chat(top_p=1.5), 400, "top_p", "invalid_value", "less than or equal to 1"),
        (chat(seed=-2), 400, "seed", "invalid_value", "greater than or equal to -1"),
        (chat(stop=5), 400, "stop", "invalid_value", "valid string or a valid array"),
        (chat(messages="hello"), 400, "messages", "invalid_value", "valid array"),
        (chat(messages=[]), 400, "messages", "invalid_value", "it is empty"),
        (chat(messages=[{"role": "boss", "content": "x"}]), 400, "messages.0.role", "invalid_value", "'user'"),
        (chat(messages=[{"role": "user", "content": 3}]), 400, "messages.0.content", "invalid_value", "string"),
        ({"model": "greedy"}, 400, "messages", "missing_required_parameter", "required"),
        (chat(n=2, s2t={"decisions": True}), 400, "s2t.decisions", "invalid_value", "n = 1"),
        (chat("word " * 2000), 400, "messages", "context_length_exceeded", "context is 1024 tokens"),
        (chat(max_tokens=1024), 400, "messages", "context_length_exceeded", "may take 1024"),
        (chat(model="s2t-local-k65"), 404, "model", "model_not_found", "at most 64"),
        (chat(model="s2t-k1000"), 404, "model", "model_not_found", "at most 64"),
        (chat(model="maj@1000"), 404, "model", "model_not_found", "at most 128"),
        (chat(model=f"maj@{'9' * 5000}"), 404, "model", "model_not_found", "no policy named"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            *(400, "messages.0.content.0.type", "invalid_value", "'text'"),
        ),
        (chat(str=1), 400, "str", "unknown_parameter", "unsupported"),
    ],
)
def test_every_error_has_openais_shape_and_names_what_is_wrong(client, body, status, param, code, words):
    response = client.post("/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code)
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")


@pytest.mark.parametrize(
    ("body", "words"), [("{", "not valid JSON"), ("", "not valid JSON"), ("[]", "not a JSON object")]
)
def test_a_malformed_body_is_a_400(client, body: str, words: str):
    for path in ("/chat/completions", "/completions"):
        response = client.post(path, content=body)
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]


def test_half_a_character_is_a_400(client):
    half = r'"\ud83d"'
    messages = f'{{"model": "greedy", "messages": [{{"role": "user", "content": {half}}}]}}'
    for path, content in (
        ("/chat/completions", messages),
        ("/completions", f'{{"model": "greedy", "prompt": {half}}}'),
    ):
        response = client.post(path, content=content)
        assert response.status_code == 400, response.text
        assert "not valid JSON" in response.json()["error"]["message"]


def test_prompts_that_are_no_prompts(client, tokenizer):
    for prompt, words in (
        ([], "empty"),
        ([len(tokenizer)], "outside the vocabulary"),
        ([-1], "outside"),
        (["a", 1], "valid integer"),
        ("", "empty"),
    ):
        response = client.post("/completions", json={"model": "greedy", "prompt": prompt})
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("prompt")
        assert words in response.json()["error"]["message"]


def test_unknown_paths_and_methods_have_the_same_shape(client):
    assert (client.get("/nothing").status_code, client.get("/chat/completions").status_code) == (404, 405)
    assert client.get("/nothing").json()["error"]["code"] == "unknown_url"
    assert client.get("/chat/completions").json()["error"]["code"] == "method_not_allowed"
    assert client.get("/chat/completions").headers["allow"] == "POST"
    assert client.get("/models/nope").status_code == 404


def test_the_engine_contract_holds_over_a_handle(endpoint: str, tokenizer):
    from ray import serve

    from serving.engine_deployment import RemoteEngine

    prompt = prompt_ids(tokenizer, QUESTIONS[0])
    ids_TN = np.arange(12).reshape(4, 3)

    async def calls():
        engine = RemoteEngine(serve.get_deployment_handle("slm", app.NAME))
        with pytest.raises(ContextOverflow, match="slm's context of 1024"):
            await engine.generate([1] * 1000, Sampling(max_tokens=100))
        return await engine.score(prompt, len(prompt) - 3, ids_TN)

    scores = asyncio.run(calls())
    with torch.no_grad():
        logits = loading.load_model(SLM)(torch.tensor([prompt])).logits[0, -4:, : len(tokenizer)]
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(ids_TN)).numpy()
    assert np.abs(scores.logprobs_TN - expected).max() < 1e-4
    assert scores.argmax_T.tolist() == logits.argmax(-1).tolist()


def refusal(capsys, recipe: Path, *settings: str) -> str:
    """What `s2t serve` says where it refuses: one line."""
    arguments = ["--recipe", str(recipe)]
    for setting in settings:
        arguments += ["--set", setting]
    assert app.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_models_that_do_not_belong_together_are_refused(
    capsys, recipe_path: Path, untrained_artifact: Path, tmp_path: Path
):
    folder = tmp_path / "other"
    shutil.copytree(loading.resolve(SLM), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "teacher: the tokenizers of" in refusal(capsys, recipe_path, f"teacher.path={folder}")
    assert "x: the tokenizers of" in refusal(capsys, recipe_path, f"checkpoints.x={folder}")
    error = refusal(capsys, recipe_path, f"artifact={untrained_artifact}", "slm.path=embedded:teacher")
    assert "was made with another SLM than embedded:teacher" in error
    error = refusal(capsys, recipe_path, f"artifacts.x={untrained_artifact}", "slm.path=embedded:teacher")
    assert f"artifacts.x: {untrained_artifact} was made with another SLM than embedded:teacher" in error
    assert "artifacts.x: " in (error := refusal(capsys, recipe_path, f"artifacts.x={tmp_path / 'none'}"))
    assert "no such artifact directory" in error
    assert "routers.x: " in refusal(capsys, recipe_path, f"routers.x={tmp_path / 'none'}")
    assert "no such artifact directory" in refusal(capsys, recipe_path, f"artifact={tmp_path / 'none'}")
    assert "not an S2T-Local artifact" in refusal(capsys, recipe_path, f"artifact={tmp_path}")
    assert "no such model folder" in refusal(capsys, recipe_path, f"checkpoints.x={tmp_path / 'none'}")
    assert "router.path" in refusal(capsys, recipe_path, f"router.path={tmp_path / 'none'}")
    assert "trigger.calibration" in refusal(capsys, recipe_path, f"trigger.calibration={tmp_path / 'none'}")


def test_a_calibration_gives_thresholds_to_the_pair_it_was_made_with(recipe_path: Path, tmp_path: Path):
    content = calibration(slm=loading.weights_hash(SLM), teacher=loading.weights_hash(TEACHER)).model_dump(mode="json")
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    recipe = load_recipe(recipe_path, [f"trigger.calibration={tmp_path}"])
    assert host(recipe).thresholds == {"kl": {0.1: 0.25}, "entropy": {0.1: 0.5}}
    assert set(host(recipe).engines) == {"slm", "teacher"}
    (tmp_path / "thresholds.json").write_text(json.dumps(content | {"teacher": "0"}))
    with pytest.raises(RecipeError, match="made with another teacher"):
        host(recipe)
    (tmp_path / "thresholds.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=r"thresholds of .* bucket, the recipe's divergence is .* renormalised"):
        host(load_recipe(recipe_path, [f"trigger.calibration={tmp_path}", "published=true"]))


def test_a_calibration_that_is_none_is_refused(recipe_path: Path, tmp_path: Path):
    recipe = load_recipe(recipe_path, [f"trigger.calibration={tmp_path}"])
    for content, words in (
        (None, "no such file"),
        ("{", "invalid json"),
        ('{"kl": {}}', "lacks entropy, steps, rows"),
    ):
        if content:
            (tmp_path / "thresholds.json").write_text(content)
        with pytest.raises(RecipeError, match=words):
            host(recipe)


def test_an_artifact_is_served_as_it_was_made(recipe_path: Path, untrained_artifact: Path):
    for setting, words in (
        ("policies.local.prior_weight=0", r"made for policies.local.prior_weight = 2, the recipe says 0; set policies"),
        ("distil.temperature=0.5", r"made for distil.temperature = 0.1, the recipe says 0.5"),
    ):
        with pytest.raises(RecipeError, match=words):
            host(load_recipe(recipe_path, [f"artifact={untrained_artifact}", setting]))


def test_an_artifacts_kl_thresholds_hold_for_its_divergence_only(recipe_path: Path, untrained_artifact: Path):
    artifact = f"artifact={untrained_artifact}"
    assert set(host(load_recipe(recipe_path, [artifact])).thresholds) == {"head", "kl", "entropy"}
    assert set(host(load_recipe(recipe_path, [artifact, "published=true"])).thresholds) == {"head", "entropy"}


def test_a_port_that_is_taken_and_a_cluster_too_small_are_refused(capsys, endpoint: str, recipe_path: Path):
    serves = endpoint.removesuffix("/v1").rpartition(":")[2]
    assert "take 1001 CPUs" in refusal(capsys, recipe_path, "slm.num_cpus=1000", f"serving.port={serves}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = taken.getsockname()[1]
        assert "Serve runs on this cluster already, and not at" in refusal(capsys, recipe_path, f"serving.port={free}")
        with pytest.raises(RecipeError, match="Address already in use"):
            port.check_is_free(load_recipe(recipe_path, [f"serving.port={free}"]).serving)


def test_ctrl_c_while_it_starts_ends_in_one_line(recipe_path: Path):
    process = start("-m", "serving.app", "--recipe", str(recipe_path), "--set", f"serving.port={free_port()}")
    wait_until(lambda: has_child(process, "raylet"), process)
    ctrl_c(process)
    assert end(process) == (130, "", "serve: stopped\n")
