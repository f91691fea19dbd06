"""The OpenAI API's requests, responses and errors as this project serves them: chat and text completions, no streaming.

Unknown fields and wrong types are refused by name, so that nothing a client asks for is silently ignored. The
extension object `s2t` carries what a policy did and what it cost. This module knows nothing of policies or engines.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2t_models.engines.contract import Decision, Finish, Usage
from s2t_models.policies.base import Span

Zero = Annotated[float, Field(ge=0, le=0)]
FinishReason = Literal["stop", "length"]
FINISH_REASONS: dict[Finish, FinishReason] = {"end": "stop", "length": "length"}


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Extension(Body):
    """`decisions`: the answer's `s2t` object shall hold decisions, spans and token ids beside the costs (n = 1 only).
    `options`: the texts of a multiple choice's options A, B, ...; a policy that votes then votes by letter."""

    decisions: bool = False
    options: list[str] = Field([], max_length=26)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


class CompletionSettings(Body):
    """What chat and text completions share. `temperature` and `top_p` left out: the policy's own. Penalties are
    accepted where they ask for nothing."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int | None = Field(None, ge=1, le=128)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    user: str | None = None
    s2t: Extension = Extension()

    def limit(self) -> int | None:
        """The tokens asked for; None: as many as fit the context."""
        return self.max_tokens

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]


class ChatRequest(CompletionSettings):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(CompletionSettings):
    """A text, or the prompt's token ids; 16 tokens unless told otherwise, as in OpenAI's API."""

    prompt: str | list[int]

    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens


R = TypeVar("R", bound=CompletionSettings)


class TokenUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class S2T(BaseModel):
    """What the policy did. `usage` is each engine's cost summed over the choices, `seed` the first choice's (with it
    the same request gives the same answer), `seconds` the wall-clock time spent decoding, `models` the sha256 of each
    engine's weights, `samples` the texts voted over (maj@n), `spans` the output's [source, tokens] in order, `ids` its
    token ids."""

    usage: dict[str, dict[str, int]]
    seed: int
    seconds: float
    models: dict[str, str]
    samples: list[str] = []
    decisions: list[dict[str, Any]] | None = None
    spans: list[tuple[str, int]] | None = None
    ids: list[int] | None = None


class ChatChoice(BaseModel):
    index: int
    message: dict[str, str]
    finish_reason: FinishReason
    logprobs: None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    s2t: S2T


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage
    s2t: S2T


class ModelEntry(BaseModel):
    """A policy as a model. `kind` is its name without K and budget; these and `votes` are null where they mean nothing
    to it. `needs` names the engines it calls, `context` counts the tokens of prompt and answer, and `settings` are all
    that decide what it writes beside the weights: thresholds, candidates, sampling."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "s2t"
    kind: str
    k: int | None
    budget: float | None
    votes: int | None
    needs: list[str]
    context: int
    settings: dict[str, Any]


class ModelList(BaseModel):
    """`unavailable` says of each policy that is not offered here why."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    unavailable: dict[str, str] = {}


def read(kind: type[R], body: bytes) -> R:
    """The request in an HTTP body. Raises ApiError (400) naming the field that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream:
        raise ApiError(400, "stream: streaming is not supported yet; leave it out or send false", param="stream")
    if request.s2t.decisions and (request.n or 1) > 1:
        raise ApiError(400, "s2t.decisions: reported for one choice only; send n = 1", param="s2t.decisions")
    return request


def _refusal(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False)
    # Of a union's members the one that got furthest is the one that was meant.
    root = _field(problems[0]["loc"])
    problem = max((p for p in problems if _field(p["loc"]).startswith(root)), key=lambda p: len(p["loc"]))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json")
    field = _field(problem["loc"])
    if not field:
        return ApiError(400, "the body is not a JSON object", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: unknown or unsupported field", param=field, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"{field}: this field is required", param=field, code="missing_required_parameter")
    wanted = " or ".join(dict.fromkeys(other["msg"] for other in problems if _field(other["loc"]) == field))
    wanted = wanted.replace(" or Input should be", " or")
    return ApiError(400, f"{field}: {wanted[0].lower()}{wanted[1:]}", param=field, code="invalid_value")


def _field(location: tuple[int | str, ...]) -> str:
    """`messages.0.content` of pydantic's location, which also names the union member tried ("str", "list[int]")."""
    first, rest = location[:1], location[1:]
    return ".".join(str(part) for part in (*first, *(p for p in rest if p != "str" and not str(p).startswith("list["))))


def truncate(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text up to the first stop string in it, and whether there was one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def usage_by_engine(usages: list[dict[str, Usage]]) -> dict[str, dict[str, int]]:
    """Each engine's costs, summed over the choices."""
    total: dict[str, Usage] = {}
    for usage in usages:
        for engine, cost in usage.items():
            total[engine] = total.get(engine, Usage()) + cost
    return {engine: asdict(cost) for engine, cost in total.items()}


def as_decisions(decisions: list[Decision]) -> list[dict[str, Any]]:
    return [asdict(decision) for decision in decisions]


def as_spans(spans: list[Span]) -> list[tuple[str, int]]:
    return [(span.source, len(span.ids)) for span in spans]
