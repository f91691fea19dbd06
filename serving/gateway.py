"""The gateway: the OpenAI API over HTTP, where each policy is a model name.

It tokenises with the SLM's chat template, runs the policy over the engines' handles and turns the tokens into text. It
holds no model. A client that goes away cancels its request: Serve cancels the handler and the engine calls under it.
"""

import dataclasses
import logging
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic_core import to_jsonable_python
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from s2t_models import chat
from s2t_models.engines.contract import ContextOverflow, EngineDied, ModelCard
from s2t_models.errors import one_line
from s2t_models.hosting import Hosting
from s2t_models.loading import load_tokenizer
from s2t_models.policies import PolicyError, base, lacking, offer
from s2t_models.policies import policy as policy_named
from serving import openai_protocol as api
from serving.engine_deployment import RemoteEngine
from serving.playground.routes import router as playground

log = logging.getLogger("ray.serve")
# `serve.ingress` pickles the app where it decorates the class, before this module is whole: routes see only names
# defined above it, and their annotations have to be objects, not the strings of `from __future__ import annotations`.
app = FastAPI(title="Select to Think", docs_url=None, redoc_url=None, openapi_url=None)
app.include_router(playground)


async def _answered(handle: Callable[[], Awaitable[Any]]) -> Response:
    """The answer, or the error in OpenAI's shape. This is the one place that catches everything: a failed request must
    not be more to its client than a failed request."""
    try:
        answer = await handle()
    except api.ApiError as error:
        return _failed(error)
    except ContextOverflow as error:
        return _failed(api.ApiError(400, str(error), code="context_length_exceeded"))
    except (RayActorError, DeploymentUnavailableError, BackPressureError, EngineDied):
        message = "an engine of this policy is not available just now; try again"
        return _failed(api.ApiError(503, message, kind="server_error", code="engine_unavailable"))
    except Exception as error:
        log.exception("a request failed")
        cause = error.cause if isinstance(error, RayTaskError) else error
        message = f"internal error: {type(cause).__name__}: {one_line(cause)}"
        return _failed(api.ApiError(500, message, kind="server_error", code="internal_error"))
    if isinstance(answer, dict):
        return JSONResponse(answer)
    return Response(answer.model_dump_json(), media_type="application/json")


def _failed(error: api.ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)


@app.exception_handler(HTTPException)
async def no_such_route(request: Request, error: HTTPException) -> Response:
    """A path or method the gateway does not serve."""
    message = f"{request.method} {request.url.path}: {HTTPStatus(error.status_code).phrase.lower()}"
    code = "method_not_allowed" if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED else "unknown_url"
    response = _failed(api.ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response


@serve.ingress(app)
class Gateway:
    """`engines` maps an engine's name to its handle. Every engine shares the SLM's tokenizer.

    The models listed are the policies with the recipe's settings; one with others in its name (s2t@0.05, maj@3) is
    made when it is asked for."""

    def __init__(self, hosting: Hosting, engines: dict[str, DeploymentHandle]) -> None:
        self._hosting = hosting
        self._recipe = hosting.recipe
        self._tokenizer = load_tokenizer(hosting.tokenizer)
        self._remote = {name: RemoteEngine(handle) for name, handle in engines.items()}
        self._engines = base.Engines(
            by_name={**self._remote},
            decode=self._text,
            encode=lambda text: chat.encode(self._tokenizer, text),
        )
        self._policies, self._refused = offer(hosting)
        self._started = int(time.time())

    @app.get("/health")
    async def health(self) -> Response:
        """Which recipe is served, and each engine's card."""
        return await _answered(self._health)

    @app.get("/v1/models")
    async def models(self) -> Response:
        return await _answered(self._models)

    @app.get("/v1/models/{name:path}")
    async def model(self, name: str) -> Response:
        return await _answered(lambda: self._entry(self._policy(name)))

    @app.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        return await _answered(lambda: self._chat(request))

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await _answered(lambda: self._completions(request))

    async def _health(self) -> dict[str, Any]:
        cards = {name: await engine.card() for name, engine in self._remote.items()}
        return {
            "status": "ok",
            "recipe": self._recipe.name,
            "digest": self._hosting.digest,
            "engines": {name: to_jsonable_python(card) for name, card in cards.items()},
        }

    async def _models(self) -> api.ModelList:
        entries = [await self._entry(policy) for policy in self._policies.values()]
        return api.ModelList(data=entries, unavailable=self._refused)

    async def _entry(self, policy: base.Policy) -> api.ModelEntry:
        return api.ModelEntry(
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

    async def _chat(self, http: Request) -> api.ChatResponse:
        request = api.read(api.ChatRequest, await http.body())
        policy = self._policy(request.model)
        messages = [{"role": message.role, "content": message.text()} for message in request.messages]
        try:
            prompt = chat.prompt_ids(self._tokenizer, messages)
        except chat.ChatError as error:
            raise api.ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from None
        texts, reasons, usage, s2t = await self._decode(policy, request, prompt, "messages")
        return api.ChatResponse(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=policy.name,
            choices=[
                api.ChatChoice(index=i, message={"role": "assistant", "content": text}, finish_reason=reason)
                for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
            ],
            usage=usage,
            s2t=s2t,
        )

    async def _completions(self, http: Request) -> api.CompletionResponse:
        request = api.read(api.CompletionRequest, await http.body())
        policy = self._policy(request.model)
        prompt = request.prompt if isinstance(request.prompt, list) else self._begun(request.prompt)
        if not prompt:
            raise api.ApiError(400, "prompt: it is empty", param="prompt", code="invalid_value")
        if not all(0 <= token < len(self._tokenizer) for token in prompt):
            message = f"prompt: a token id lies outside the vocabulary, 0 to {len(self._tokenizer) - 1}"
            raise api.ApiError(400, message, param="prompt", code="invalid_value")
        texts, reasons, usage, s2t = await self._decode(policy, request, prompt, "prompt")
        return api.CompletionResponse(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=policy.name,
            choices=[
                api.CompletionChoice(index=i, text=text, finish_reason=reason)
                for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
            ],
            usage=usage,
            s2t=s2t,
        )

    async def _decode(
        self, policy: base.Policy, request: api.CompletionSettings, prompt: list[int], field: str
    ) -> tuple[list[str], list[api.FinishReason], api.TokenUsage, api.S2T]:
        """Run the policy once a choice, with seeds that follow each other: from the request's, or from one drawn for
        it."""
        limit = await self._limit(policy, len(prompt), request.limit(), field)
        seed = secrets.randbelow(2**32) if request.seed is None else request.seed
        began = time.perf_counter()
        requests = [
            base.Request(prompt, limit, seed + choice, request.temperature, request.top_p, tuple(request.s2t.options))
            for choice in range(request.n or 1)
        ]
        decoded = await base.all_of(base.gather(policy.decode(self._engines, one)) for one in requests)
        seconds = time.perf_counter() - began

        texts: list[str] = []
        reasons: list[api.FinishReason] = []
        for choice in decoded:
            text, stopped = api.truncate(self._text(choice.ids), request.stops())
            texts.append(text)
            reasons.append("stop" if stopped else api.FINISH_REASONS[choice.finish])
        completion = sum(len(choice.ids) for choice in decoded)
        usage = api.TokenUsage(
            prompt_tokens=len(prompt), completion_tokens=completion, total_tokens=len(prompt) + completion
        )
        s2t = api.S2T(
            usage=api.usage_by_engine([choice.usage for choice in decoded]),
            seed=seed,
            seconds=seconds,
            models={name: card.weights for name, card in (await self._cards(policy)).items()},
            samples=[self._text(ids) for choice in decoded for ids in choice.samples],
            decisions=api.as_decisions(decoded[0].decisions) if request.s2t.decisions else None,
            spans=api.as_spans(decoded[0].spans) if request.s2t.decisions else None,
            ids=decoded[0].ids if request.s2t.decisions else None,
        )
        return texts, reasons, usage, s2t

    async def _limit(self, policy: base.Policy, prompt: int, asked: int | None, field: str) -> int:
        """The tokens to decode. Raises ApiError (400) where they do not fit every engine's context."""
        context = await self._context(policy)
        wanted = 1 if asked is None else asked
        if prompt + wanted > context:
            message = (
                f"{field}: this model's context is {context} tokens; the prompt has {prompt} and the answer may take "
                f"{wanted}; shorten one of them"
            )
            raise api.ApiError(400, message, param=field, code="context_length_exceeded")
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
            raise api.ApiError(404, message, param="model", code="model_not_found")
        return found

    def _begun(self, prompt: str) -> list[int]:
        try:
            return chat.encode(self._tokenizer, prompt, special=True)
        except chat.ChatError as error:
            raise api.ApiError(400, f"prompt: {error}", param="prompt", code="invalid_value") from None

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
