"""Answers as they are written: server-sent events over real Serve, equal to what is answered whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from s2t_models import loading
from s2t_models.embedded.generator import problems
from s2t_models.settings import ModelSettings
from serving.text import TextStream

SLM = ModelSettings(path="embedded:slm", dtype="float32", device="cpu")
QUESTIONS = [problem.question for problem in problems("calibration", 8, seed=6)]
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


def chunks_of(lines: list[str]) -> list[dict[str, Any]]:
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def stream(client: httpx.Client, body: dict[str, Any], path: str = "/chat/completions") -> list[dict[str, Any]]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return chunks_of([line for line in response.iter_lines() if line])


def text_of(chunks: list[dict[str, Any]], choice: int = 0) -> str:
    mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice]
    return "".join(c["delta"].get("content", "") for c in mine)


def whole(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "name",
    ["greedy", "sample", "maj@3", "takeover", "s2t", "s2t-local", "s2t-local-kl", "specreason", "multiplex", "tah"],
)
def test_every_policy_streams_what_it_answers(client, name: str):
    body = chat(model=name, seed=3, s2t={"decisions": True})
    answer = whole(client, body)
    chunks = stream(client, body | {"stream_options": {"include_usage": True}})
    *parts, last = chunks
    assert text_of(parts) == answer["choices"][0]["message"]["content"]
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert parts[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert last["choices"] == []
    assert last["usage"] == answer["usage"]
    assert last["s2t"]["seed"] == answer["s2t"]["seed"] == 3
    for engine, cost in answer["s2t"]["usage"].items():
        assert last["s2t"]["usage"][engine]["decode"] == cost["decode"]
    tokens = [pair for part in parts for pair in part.get("s2t", {}).get("tokens", [])]
    decisions = [d for part in parts for d in part.get("s2t", {}).get("decisions", [])]
    assert tokens == answer["s2t"]["tokens"]
    assert [d["step"] for d in decisions] == [d["step"] for d in answer["s2t"]["decisions"]]
    assert [d["chosen"] for d in decisions] == [d["chosen"] for d in answer["s2t"]["decisions"]]


@pytest.mark.parametrize("name", ["sample", "maj@3", "specreason"])
def test_penalties_stream_what_they_answer(client, name: str):
    body = chat(model=name, seed=3, frequency_penalty=2, repetition_penalty=1.5)
    answer = whole(client, body)["choices"][0]["message"]["content"]
    assert text_of(stream(client, body)) == answer
    assert answer != whole(client, chat(model=name, seed=3))["choices"][0]["message"]["content"]


def test_decisions_come_with_their_texts(client, tokenizer):
    chunks = stream(client, chat(model="s2t", s2t={"decisions": True}))
    seen = 0
    for chunk in chunks:
        seen += len(chunk.get("s2t", {}).get("tokens", []))
        for decision in chunk.get("s2t", {}).get("decisions", []):
            assert decision["texts_K"] == [tokenizer.decode([token]) for token in decision["candidates_K"]]
            assert decision["chosen_text"] == tokenizer.decode([decision["chosen"]])
            assert decision["argmax_text"] == tokenizer.decode([decision["argmax"]])
            assert decision["step"] < seen, "its token is there"
    assert seen


def test_tokens_come_one_after_another(client):
    """Not all at the end."""
    chunks = stream(client, chat(model="llm", max_tokens=200))
    assert sum(bool(c["choices"][0]["delta"].get("content")) for c in chunks) > 3


def test_several_choices_stream_side_by_side(client):
    body = chat(model="sample", temperature=1.2, seed=5, n=3)
    answer = whole(client, body)
    chunks = stream(client, body)
    for choice in answer["choices"]:
        assert text_of(chunks, choice["index"]) == choice["message"]["content"]
    ends = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_a_stop_text_never_shows_in_part(client):
    text = whole(client, chat())["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    for name in ("greedy", "s2t", "takeover", "s2t-local"):
        body = chat(model=name, stop=[stop, "~"])
        answer, chunks = whole(client, body), stream(client, body)
        assert text_of(chunks) == answer["choices"][0]["message"]["content"]
        assert stop not in text_of(chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]


def test_what_is_refused_is_refused_before_the_stream(client):
    for body, status in ((chat(model="nope"), 404), (chat(max_tokens=5000), 400), (chat(n=0), 400)):
        response = client.post("/chat/completions", json=body | {"stream": True})
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_reader_that_goes_away_leaves_the_engine_free(client, endpoint: str):
    alone = whole(client, chat())["choices"][0]["message"]["content"]
    for _ in range(3):
        with client.stream(
            "POST", "/chat/completions", json=chat(model="llm", max_tokens=900, stream=True)
        ) as response:
            next(response.iter_lines())
    assert whole(client, chat())["choices"][0]["message"]["content"] == alone


def test_streamed_at_once_they_are_what_they_are_alone(client, endpoint: str):
    bodies = [
        chat(question, model, seed=seed)
        for seed, question in enumerate(QUESTIONS)
        for model in ("greedy", "sample", "s2t", "s2t-local")
    ]
    alone = [whole(client, body)["choices"][0]["message"]["content"] for body in bodies]

    async def one(many: httpx.AsyncClient, body: dict[str, Any]) -> str:
        async with many.stream("POST", "/chat/completions", json=body | {"stream": True}) as response:
            return text_of(chunks_of([line async for line in response.aiter_lines() if line]))

    async def together() -> list[str]:
        async with httpx.AsyncClient(base_url=endpoint, timeout=120) as many:
            return list(await asyncio.gather(*(one(many, body) for body in bodies)))

    assert asyncio.run(together()) == alone


def test_completions_stream_too(client):
    body = {"model": "greedy", "prompt": ["One and two", "Three"], "max_tokens": 12}
    answer = client.post("/completions", json=body).json()
    chunks = stream(client, body, "/completions")
    for choice in answer["choices"]:
        mine = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(mine) == choice["text"]


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_log_probabilities_joined_are_those_of_the_whole(client, echo: bool):
    body = {"model": "greedy", "prompt": ["One and two", "Three"], "max_tokens": 12, "logprobs": 1, "echo": echo}
    answer = client.post("/completions", json=body).json()
    chunks = stream(client, body, "/completions")
    for choice in answer["choices"]:
        mine = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        for part in ("tokens", "text_offset"):
            assert [each for logprobs in mine if logprobs for each in logprobs[part]] == choice["logprobs"][part]


@pytest.fixture(scope="module")
def reference(endpoint: str):
    """Log-probabilities [T, V] by transformers' own forward, over the rows that are text."""
    model = loading.load_model(SLM)
    cards = httpx.get(endpoint.removesuffix("/v1") + "/health").json()["engines"]
    masked = cards["slm"]["masked_ids"]

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0]
        logits_TV[:, masked] = -torch.inf
        return logits_TV.log_softmax(-1)

    return logprobs


def test_a_prompt_is_scored_as_transformers_scores_it(client, tokenizer, reference):
    """What lm-evaluation-harness asks for: the prompt echoed with log-probabilities, as token ids, several at once."""
    prompts = [tokenizer.encode(question) for question in QUESTIONS[:3]]
    for written in (0, 1):
        body = {"model": "greedy", "prompt": prompts, "max_tokens": written, "logprobs": 1, "echo": True, "seed": 1234}
        choices = client.post("/completions", json=body | {"temperature": 0}).json()["choices"]
        assert len(choices) == 3
        for prompt, choice in zip(prompts, choices, strict=True):
            shown, logprobs_TV = choice["logprobs"], reference(prompt)
            assert len(shown["tokens"]) == len(shown["token_logprobs"]) == len(prompt) + written
            assert shown["token_logprobs"][0] is None
            expected = logprobs_TV[range(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(shown["token_logprobs"][1 : len(prompt)], expected, atol=1e-3)
            for t, (token, best) in enumerate(zip(shown["tokens"][1:], shown["top_logprobs"][1:], strict=True)):
                (likeliest,) = best
                assert best[likeliest] == pytest.approx(float(logprobs_TV[t].max()), abs=1e-3)
                if t + 1 < len(prompt):
                    is_greedy = int(logprobs_TV[t].argmax()) == prompt[t + 1]
                    assert (token == likeliest) == is_greedy
            assert choice["text"].startswith(tokenizer.decode(prompt))


def test_chat_logprobs_are_those_of_the_model(client, tokenizer, reference):
    body = chat(model="sample", temperature=1.5, top_p=1.0, seed=4, logprobs=True, top_logprobs=3, max_tokens=20)
    answer = whole(client, body)
    content = answer["choices"][0]["logprobs"]["content"]
    prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
    ids = whole(client, body | {"logprobs": None, "top_logprobs": None, "s2t": {"decisions": True}})["s2t"]["ids"]
    logprobs_TV = reference(prompt + ids)[len(prompt) - 1 : -1]
    assert len(content) == len(ids)
    for t, entry in enumerate(content):
        assert entry["logprob"] == pytest.approx(float(logprobs_TV[t, ids[t]]), abs=1e-3)
        assert entry["token"] == tokenizer.decode([ids[t]])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        top = [best["logprob"] for best in entry["top_logprobs"]]
        np.testing.assert_allclose(top, logprobs_TV[t].topk(3).values, atol=1e-3)
    streamed = [c["choices"][0]["logprobs"] for c in stream(client, body) if c["choices"][0]["logprobs"]]
    assert [e["token"] for part in streamed for e in part["content"]] == [e["token"] for e in content]


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [], "tool_choice": "none"},
        {"logprobs": False},
        {"response_format": {"type": "text"}, "n": 1, "logit_bias": {}},
        {"top_k": -1, "repetition_penalty": 1.0, "seed": -1, "presence_penalty": 0},
        {"store": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True},
        {"stop": None, "user": "someone", "stream_options": None},
    ],
)
def test_what_changes_nothing_passes(client, more: dict[str, Any]):
    plain = whole(client, chat())["choices"][0]["message"]["content"]
    assert whole(client, chat() | more)["choices"][0]["message"]["content"] == plain


def test_roles_and_replayed_messages(client):
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    texts = [whole(client, chat(messages=m))["choices"][0]["message"]["content"] for m in (system, developer)]
    assert texts[0] == texts[1]
    replayed = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
        "function_call": None,
    }
    user = {"role": "user", "content": QUESTIONS[1]}
    assert whole(client, chat(messages=[user, replayed, user]))["choices"]


def test_text_is_the_same_however_it_is_cut(tokenizer):
    ids = tokenizer.encode("Zoë has 3 🥚 and sells 2. Ünlü! Then 1 is left.")
    full = tokenizer.decode(ids, skip_special_tokens=True)
    for size in (1, 2, 5, len(ids)):
        text = TextStream(tokenizer, ())
        parts = [text.add(ids[at : at + size])[0] for at in range(0, len(ids), size)]
        assert "".join(parts) + text.end() == full
    for at in range(5, len(full) - 12):  # wherever tokens begin and end
        stop = full[at : at + 9]
        text = TextStream(tokenizer, ("~", stop))
        shown = ""
        for token in ids:
            shown += text.add([token])[0]
            assert full[: full.index(stop)].startswith(shown)
        assert shown + text.end() == full[: full.index(stop)]
        assert text.stopped


def test_the_responses_api(client, endpoint: str):
    models = openai.OpenAI(base_url=endpoint, api_key="none", max_retries=0)
    chatted = whole(client, chat(model="s2t", seed=2))["choices"][0]["message"]["content"]
    asked: Any = {"model": "s2t", "input": QUESTIONS[0], "max_output_tokens": LONG, "extra_body": {"seed": 2}}
    answer = models.responses.create(**asked)
    assert answer.output_text == chatted
    assert answer.usage is not None
    assert answer.status in ("completed", "incomplete")
    events = list(models.responses.create(**asked, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == chatted
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    last = events[-1]
    assert last.type == f"response.{answer.status}"
    assert last.response.usage == answer.usage
    complete = whole(client, chat(model="llm", max_tokens=400))["choices"][0]
    assert complete["finish_reason"] == "stop"
    with models.responses.stream(model="llm", input=QUESTIONS[0], max_output_tokens=400) as stream:
        assert stream.get_final_response().output_text == complete["message"]["content"]
    turns: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTIONS[1]}]},
        *answer.output,
        {"role": "user", "content": "And then?"},
    ]
    assert models.responses.create(model="greedy", input=turns, max_output_tokens=3, store=False).output_text
    with pytest.raises(openai.BadRequestError, match="previous_response_id: not supported here"):
        models.responses.create(model="greedy", input="x", previous_response_id="resp_1")


def test_the_scorer_can_be_asked_about_one_state(client, tokenizer):
    """The decision of a state is the one that decoding took there."""
    messages = chat()["messages"]
    for name in ("s2t", "takeover", "s2t-local", "s2t-local-kl"):
        answer = whole(client, chat(model=name, seed=2, s2t={"decisions": True}))["s2t"]
        assert answer["decisions"]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for decision in answer["decisions"][:2]:
            state = {"model": name, "prompt": prompt + answer["ids"][: decision["step"]], "seed": 2}
            scored = client.post("/score", json=state).json()
            assert scored["triggered"]
            for field in ("candidates_K", "texts_K", "chosen", "argmax"):
                assert scored["decision"][field] == decision[field]
            np.testing.assert_allclose(scored["decision"]["scores_K"], decision["scores_K"], atol=1e-5)
            assert set(scored["usage"]) == set(answer["usage"])
    said = client.post("/score", json={"model": "s2t", "messages": messages, "answer": "So"}).json()
    assert len(said["decision"]["candidates_K"]) == 8
    for body, words in (
        ({"model": "greedy", "prompt": "x"}, "greedy has no scorer"),
        ({"model": "s2t"}, "either messages or a prompt"),
        ({"model": "s2t", "prompt": []}, "empty"),
    ):
        refused = client.post("/score", json=body)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]


def test_openais_asynchronous_client(client, endpoint: str):
    """Chats, text completions and responses, whole and streamed, all at once. `parse` takes only an answer that came to
    its end."""
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    asked: Any = chat(model="llm", max_tokens=300)
    expected = whole(client, asked)["choices"][0]["message"]["content"]
    scored: Any = {"model": "greedy", "prompt": QUESTIONS[:2], "max_tokens": 4, "echo": True, "logprobs": 2}

    async def whole_chat(models: openai.AsyncOpenAI) -> str | None:
        return (await models.chat.completions.create(**asked)).choices[0].message.content

    async def streamed_chat(models: openai.AsyncOpenAI) -> str | None:
        chunks = await models.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        return "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])

    async def gathered_chat(models: openai.AsyncOpenAI) -> str | None:
        async with models.chat.completions.stream(**asked) as events:
            return (await events.get_final_completion()).choices[0].message.content

    async def parsed_chat(models: openai.AsyncOpenAI) -> str | None:
        return (await models.chat.completions.parse(**asked)).choices[0].message.content

    async def streamed_response(models: openai.AsyncOpenAI) -> str:
        async with models.responses.stream(model="llm", input=messages) as events:
            return (await events.get_final_response()).output_text

    async def scores(models: openai.AsyncOpenAI) -> tuple[list[str], list[str]]:
        answer = await models.completions.create(**scored)
        assert all(choice.logprobs and choice.logprobs.token_logprobs for choice in answer.choices)
        streamed = ["", ""]
        async for chunk in await models.completions.create(**scored, stream=True):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
        return [choice.text for choice in answer.choices], streamed

    async def together() -> Any:
        async with openai.AsyncOpenAI(base_url=endpoint, api_key="none", max_retries=0) as models:
            chats = (whole_chat, streamed_chat, gathered_chat, parsed_chat, streamed_response)
            return await asyncio.gather(scores(models), *(ask(models) for ask in chats))

    (texts, streamed), *answers = asyncio.run(together())
    assert answers == [expected] * 5
    assert texts == streamed
    assert all(text.startswith(question) for text, question in zip(texts, QUESTIONS, strict=False))
