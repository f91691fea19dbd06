"""The gateway: the OpenAI API over HTTP, where each policy is a model name.

It tokenises with the SLM's chat template, runs the policy over the engines' handles and turns the tokens into text. It
holds no model. A client that goes away cancels its request: Serve cancels the handler and the engine calls under it.
"""

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing, asynccontextmanager
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_jsonable_python
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from s2t_models import chat
from s2t_models.engines.contract import ModelCard, Penalties, Usage
from s2t_models.engines.load import weights_behind
from s2t_models.hosting import Hosting
from s2t_models.loading import load_tokenizer
from s2t_models.policies import PolicyError, base, lacking, offer
from s2t_models.policies import policy as policy_named
from serving import decoding, metrics, responses_answers
from serving import openai_answers as answers
from serving import openai_protocol as api
from serving.admission import Admission
from serving.answering import Job, answered, chunks, streamed
from serving.decodes import Decode
from serving.decoding import Ended, Piece, StepLogprobs
from serving.engine_deployment import RemoteEngine
from serving.errors import ApiError, failed
from serving.front import Front, arrived, note_policy
from serving.keys import Keys
from serving.measuring import measured
from serving.openai_answers import Answer
from serving.openapi import describe
from serving.operations import Operated, router
from serving.placement import gateways, places
from serving.playground.routes import router as playground
from serving.text import written_alone

# `serve.ingress` pickles the app where it decorates the class, before this module is whole: routes see only names
# defined above it, and their annotations have to be objects, not the strings of `from __future__ import annotations`.
app = FastAPI(title="Select to Think", docs_url=None, redoc_url=None)
app.add_middleware(Front)
app.include_router(router)
app.include_router(playground)
describe(app)


@app.exception_handler(HTTPException)
async def no_such_route(request: Request, error: HTTPException) -> Response:
    """A path or method the gateway does not serve."""
    message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
    code = "method_not_allowed" if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else "unknown_url"
    response = failed(ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response


@serve.ingress(app)
class Gateway(Operated):
    """`engines` maps an engine's name to its handle. Every engine shares the SLM's tokenizer.

    The models listed are the policies with the recipe's settings; one with others in its name (s2t@0.05, maj@3) is
    made when it is asked for."""

    def __init__(self, hosting: Hosting, engines: dict[str, DeploymentHandle], keys: Keys) -> None:
        self._hosting = hosting
        self._tokenizer = load_tokenizer(hosting.tokenizer)
        self._longest_token = max(len(token) for token in self._tokenizer.get_vocab())
        self._word = lru_cache(maxsize=2**16)(partial(written_alone, self._tokenizer))
        self._remote = {name: RemoteEngine(handle) for name, handle in engines.items()}
        serving = hosting.recipe.serving
        share = gateways(serving)
        room = {name: max(1, places(hosted.settings) // share) for name, hosted in hosting.engines.items()}
        self._admission = Admission(room, serving.max_waiting)
        metrics.waiting.set_function(lambda: self._admission.waiting)
        self._policies, self._refused = offer(hosting)
        self._started = int(time.time())
        self.operate(hosting, self._remote, keys, self._admission)

    @app.get("/v1/models")
    async def models(self) -> Response:
        return await answered(self._models)

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        return await answered(lambda: self._entry(self._policy(name)))

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await answered(lambda: self._chat(request))

    @app.post("/v1/responses")
    async def responses(self, request: Request) -> Response:
        return await answered(lambda: self._responses(request))

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await answered(lambda: self._completions(request))

    @app.post("/v1/score")
    async def score(self, request: Request) -> Response:
        return await answered(lambda: self._score(request))

    async def _models(self) -> answers.ModelList:
        entries = [await self._entry(policy) for policy in self._policies.values()]
        return answers.ModelList(data=entries, unavailable=self._refused)

    async def _entry(self, policy: base.Policy) -> answers.ModelEntry:
        return answers.ModelEntry(
            id=policy.name,
            created=self._started,
            kind=policy.kind,
            k=policy.k,
            budget=policy.budget,
            votes=policy.votes,
            needs=list(policy.needs),
            context=await self._context(policy),
            settings=to_jsonable_python(
                dataclasses.asdict(policy),  # type: ignore[call-overload]  # every policy is a dataclass
                fallback=lambda function: function.__qualname__,
            ),
        )

    async def _chat(self, http: Request) -> Any:
        request = api.read(api.ChatRequest, await http.body())
        job = await self._conversation(request, [message.plain() for message in request.messages], "messages")
        if request.stream:
            return await streamed(chunks(job, answers.CHAT, request.stream_options))
        return answers.chat_response(job.answer, await job.gathered(), job.top)

    async def _responses(self, http: Request) -> Any:
        request = api.read(api.ResponsesRequest, await http.body())
        job = await self._conversation(request, request.messages, "input")
        if request.stream:
            return await streamed(responses_answers.events(job.answer, job.pieces()))
        (written,) = await job.gathered()
        return responses_answers.response(job.answer, written)

    async def _conversation(self, request: api.Decoded, messages: list[dict[str, str]], field: str) -> Job:
        policy = self._let_in(request.model)
        return await self._job(policy, request, [await self._chat_ids(policy, messages, field)], field)

    async def _completions(self, http: Request) -> Any:
        request = api.read(api.CompletionRequest, await http.body())
        policy = self._let_in(request.model)
        special = request.add_special_tokens is not False
        prompts = [
            await self._tokenised(policy, "prompt", len(prompt), chat.encode, prompt, special)
            if isinstance(prompt, str)
            else prompt
            for prompt in request.prompts
        ]
        for prompt in prompts:
            self._check_ids(prompt)
        job = await self._job(policy, request, prompts, "prompt", echoed=request.prompts if request.echo else None)
        if request.stream:
            return await streamed(chunks(job, answers.TEXT, request.stream_options))
        return answers.completion_response(job.answer, await job.gathered(), job.top)

    async def _score(self, http: Request) -> answers.ScoreResponse:
        """What the policy's scorer says of the candidates for the next token."""
        request = api.read(api.ScoreRequest, await http.body())
        policy = self._let_in(request.model)
        if not isinstance(policy, base.Deciding):
            raise ApiError(400, f"model: {policy.name} has no scorer", param="model", code="invalid_value")
        if request.messages is not None:
            prompt = await self._chat_ids(policy, [message.plain() for message in request.messages], "messages")
            if request.answer:
                prompt += await self._tokenised(policy, "answer", len(request.answer), chat.encode, request.answer)
        elif isinstance(request.prompt, str):
            prompt = await self._tokenised(policy, "prompt", len(request.prompt), chat.encode, request.prompt, True)
        else:
            prompt = request.prompt or []
        self._check_ids(prompt)
        await self._limit(policy, len(prompt), 1, "prompt" if request.messages is None else "messages")
        identity = uuid.uuid4().hex
        state = base.Request(prompt, 1, max(request.seed or 0, 0))
        async with self._engines(identity).place(policy.needs) as engines:
            decision, triggered, usage = await policy.decide(engines, state)
        return answers.ScoreResponse(
            id=f"score-{identity}",
            created=int(time.time()),
            model=policy.name,
            triggered=triggered,
            decision=answers.as_decision(decision, self._word),
            usage=answers.usage_by_engine([usage]),
        )

    async def _job(
        self,
        policy: base.Policy,
        request: api.Decoded,
        prompts: list[list[int]],
        field: str,
        echoed: list[str] | list[list[int]] | None = None,
    ) -> Job:
        """The request's choices, n for each prompt, with seeds that follow each other: from the request's, or from one
        drawn for it. `echoed` are the prompts as they were sent, where they shall come before the answers."""
        top = request.support
        if top is not None and policy.scored_by is None:
            shown = [name for name, known in self._policies.items() if known.scored_by is not None]
            message = f"logprobs: {policy.name} has none, for no one model writes its text; {', '.join(shown)} have"
            raise ApiError(400, message, param="logprobs", code="invalid_value")
        if request.penalties and not policy.takes_penalties:
            sent = f"{next(iter(request.penalties))}_penalty"
            taking = [name for name, known in self._policies.items() if known.takes_penalties]
            message = (
                f"{sent}: {policy.name} takes no penalties, for it goes by its models' own probabilities, which they "
                f"would change; {', '.join(taking)} take them"
            )
            raise ApiError(400, message, param=sent, code="invalid_value")
        cards = await self._cards(policy)
        limits = [await self._limit(policy, len(prompt), request.limit, field) for prompt in prompts]
        drawn = request.seed is None or request.seed < 0
        seed = secrets.randbelow(2**32) if drawn else request.seed
        assert seed is not None
        identity = uuid.uuid4().hex
        engines = self._engines(identity)
        choices = []
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            for j in range(request.n_each):
                one = base.Request(
                    prompt,
                    limit,
                    seed + j,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    top_k=None if request.top_k is None else max(0, request.top_k),
                    min_p=request.min_p,
                    penalties=Penalties(**request.penalties),
                    stop=request.stops,
                    options=tuple(request.s2t.options),
                    support=0 if top is None else max(top, 1),
                    live=bool(request.stream),
                )
                number = i * request.n_each + j
                pieces = self._choice(number, policy, engines, one, top, echoed[i] if echoed else None)
                choices.append(measured(policy.name, arrived(), pieces))
        models: dict[str, str] = {}
        for name, card in cards.items():
            models |= weights_behind(card, policy.needs[name])
        answer = Answer(
            policy.name, sum(map(len, prompts)), seed, models, self._word, request.s2t.decisions, id=identity
        )
        return Job(answer, choices, top)

    async def _choice(
        self,
        number: int,
        policy: base.Policy,
        engines: base.Engines,
        request: base.Request,
        top: int | None,
        echo: str | list[int] | None,
    ) -> AsyncGenerator[Piece | Ended]:
        """The prompt where it is echoed, with its log-probabilities, then what is decoded."""
        scored: dict[str, Usage] = {}
        if echo is not None:
            logprobs: list[StepLogprobs] = []
            if top is not None and policy.scored_by is not None:
                async with engines.place([policy.scored_by]) as placed:
                    logprobs, usage = await decoding.prompt_logprobs(placed[policy.scored_by], request.prompt, top)
                scored = {policy.scored_by: usage}
            text = echo if isinstance(echo, str) else str(self._tokenizer.decode(echo))
            yield Piece(number, text, logprobs=logprobs)
        if not request.max_tokens:
            yield Ended(number, "length", scored, [])
            return
        async with aclosing(decoding.choice(number, policy, engines, self._tokenizer, request, top)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Ended):
                    piece.usage = answers.summed([scored, piece.usage])
                yield piece

    def _engines(self, request: str) -> base.Engines:
        """The engines for the request of that id."""
        encode, decode = partial(chat.encode, self._tokenizer), partial(chat.decode, self._tokenizer)

        @asynccontextmanager
        async def placed(names: Collection[str]) -> AsyncGenerator[base.Engines]:
            async with self._admission.place(request, names):
                with Decode() as one:
                    yield base.Engines({name: engine.of(one) for name, engine in self._remote.items()}, decode, encode)

        return base.Engines({**self._remote}, decode, encode, placed)

    def _let_in(self, name: str) -> base.Policy:
        """The policy of a request, where its engines are there and there is room for it. Raises ApiError (404, 503),
        or Busy."""
        policy = self._policy(name)
        note_policy(policy.name)
        if missing := self._readiness.silent() & policy.needs.keys():
            message = f"{policy.name} needs {', '.join(sorted(missing))}, which does not answer just now; try again"
            raise ApiError(503, message, kind="server_error", code="engine_unavailable")
        self._admission.check()
        return policy

    async def _limit(self, policy: base.Policy, prompt: int, asked: int | None, field: str) -> int:
        """The tokens to decode. Raises ApiError (400) where they do not fit every engine's context."""
        context = await self._context(policy)
        wanted = 1 if asked is None else asked
        if prompt + wanted > context:
            message = (
                f"{field}: this model's context is {context} tokens; the prompt has {prompt} and the answer may take "
                f"{wanted}; shorten one of them"
            )
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        return context - prompt if asked is None else asked

    async def _cards(self, policy: base.Policy) -> dict[str, ModelCard]:
        return {name: await self._remote[name].card() for name in policy.needs}

    async def _context(self, policy: base.Policy) -> int:
        return min(card.context for card in (await self._cards(policy)).values())

    def _policy(self, name: str) -> base.Policy:
        if name in self._policies:
            return self._policies[name]
        try:
            found = policy_named(name, self._hosting)
            reason = lacking(found, self._hosting)
        except PolicyError as error:
            reason = str(error).split("; there are:")[0]
        if reason is not None:
            message = f"model: {reason}; models here: {', '.join(self._policies)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return found

    async def _chat_ids(self, policy: base.Policy, messages: list[dict[str, str]], field: str) -> list[int]:
        characters = sum(len(message["content"]) for message in messages)
        return await self._tokenised(policy, field, characters, chat.prompt_ids, messages)

    async def _tokenised(
        self, policy: base.Policy, field: str, characters: int, tokenise: Callable[..., list[int]], *arguments: Any
    ) -> list[int]:
        """The prompt's ids, made off the event loop. What cannot fit the context is refused unread: a token has so many
        characters at the most."""
        context = await self._context(policy)
        if characters > context * self._longest_token:
            message = f"{field}: {characters} characters do not fit this model's context of {context} tokens"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        try:
            return await asyncio.to_thread(tokenise, self._tokenizer, *arguments)
        except chat.ChatError as error:
            raise ApiError(400, f"{field}: {error}", param=field, code="invalid_value") from None

    def _check_ids(self, prompt: list[int]) -> None:
        if not prompt:
            raise ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value")
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            message = f"prompt: a token id lies outside the vocabulary, 0 to {len(self._tokenizer) - 1}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
