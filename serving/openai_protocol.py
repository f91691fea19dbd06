"""The OpenAI API's requests as this project reads them, and its errors.

What changes nothing passes: fields left at their defaults, empty lists of tools, a replayed message's empty parts. What
would change the answer and cannot be done here is refused by name, so that nothing a client asks for is silently
ignored. This module knows nothing of policies or engines.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from serving.errors import ApiError

#: Choices of one request at most, and prompts of one.
MOST_CHOICES = 128


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _only(*values: Any) -> Any:
    """A field that is taken where it is null or one of the values, all of which ask for nothing."""

    def check(value: Any) -> Any:
        for known in (None, *values):
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return value
        shown = " or ".join("null" if known is None else repr(known).lower() for known in (*values, None))
        raise ValueError(f"not supported here; leave it out, or send {shown}")

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [None, *values]})]


def _whole(value: Any) -> Any:
    """3.0 is an integer to JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class Extension(Body):
    """`decisions`: the answer's `s2t` object shall hold decisions, spans, tokens and token ids beside the costs (one
    choice only). `options`: the texts of a multiple choice's options A, B, ...; a policy that votes then votes by
    letter."""

    decisions: bool = False
    options: list[str] = Field([], max_length=26)


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: _only([]) = None  # type: ignore[valid-type]
    logprobs: _only([]) = None  # type: ignore[valid-type]


class Turn(Body):
    """What a message of either API says, and who."""

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """The message for a chat template."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            return {"role": role, "content": "".join(part.text for part in self.content)}
        return {"role": role, "content": self.content or ""}


class Message(Turn):
    """A message of a chat, also as OpenAI's clients replay the answers they were given."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    tool_call_id: str | None = None
    refusal: _only() = None  # type: ignore[valid-type]
    annotations: _only([]) = None  # type: ignore[valid-type]
    audio: _only() = None  # type: ignore[valid-type]
    function_call: _only() = None  # type: ignore[valid-type]
    tool_calls: _only([]) = None  # type: ignore[valid-type]


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Decoded(Body):
    """What every request that decodes may say. `temperature`, `top_p`, `top_k` and `min_p` left out are the
    policy's own, and so is the seed a fresh one."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Whole | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: Whole | None = Field(None, ge=-1, lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: _only("auto", "default") = None  # type: ignore[valid-type]
    s2t: Extension = Extension()

    @property
    def penalties(self) -> dict[str, float]:
        """Those that change something, by what they go by."""
        sent = {
            "presence": (self.presence_penalty, 0),
            "frequency": (self.frequency_penalty, 0),
            "repetition": (self.repetition_penalty, 1),
        }
        return {name: value for name, (value, nothing) in sent.items() if value is not None and value != nothing}

    @property
    def n_each(self) -> int:
        """Choices for each prompt."""
        return 1

    @property
    def limit(self) -> int | None:
        """The tokens asked for; None: as many as fit the context."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        return ()

    @property
    def support(self) -> int | None:
        """How many of the most probable tokens to show at each step; None: no log-probabilities."""
        return None


class CompletionSettings(Decoded):
    """What chat and text completions share."""

    max_tokens: Whole | None = Field(None, ge=0)
    n: Whole | None = Field(None, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    store: _only(False) = None  # type: ignore[valid-type]
    length_penalty: _only(1) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    ignore_eos: _only(False) = None  # type: ignore[valid-type]
    min_tokens: _only(0) = None  # type: ignore[valid-type]
    skip_special_tokens: _only(True) = None  # type: ignore[valid-type]
    use_beam_search: _only(False) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _one_choice_with_decisions(self) -> CompletionSettings:
        if self.s2t.decisions and self.choices > 1:
            raise ValueError("s2t.decisions: reported for one choice only; send one prompt and n = 1")
        return self

    @property
    def n_each(self) -> int:
        return self.n or 1

    @property
    def choices(self) -> int:
        """Of all prompts together."""
        return self.n_each

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(stop for stop in stops if stop)


class ChatRequest(CompletionSettings):
    messages: list[Message] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None
    functions: _only([]) = None  # type: ignore[valid-type]
    function_call: _only("none", "auto") = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    reasoning_effort: _only("none") = None  # type: ignore[valid-type]
    add_generation_prompt: _only(True) = None  # type: ignore[valid-type]
    continue_final_message: _only(False) = None  # type: ignore[valid-type]
    echo: _only(False) = None  # type: ignore[valid-type]

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def support(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _top_of_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: send logprobs: true with it")
        return self


class CompletionRequest(CompletionSettings):
    """One prompt or several, each a text or its token ids; 16 tokens unless told otherwise, as in OpenAI's API. With
    `echo` the prompt comes before the answer; with `max_tokens` 0 nothing is written, and the prompt is scored."""

    prompt: (
        str
        | Annotated[list[Whole], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[Whole], Field(min_length=1)]], Field(min_length=1)]
    )
    echo: bool | None = None
    logprobs: Whole | None = Field(None, ge=0, le=20)
    add_special_tokens: bool | None = None
    suffix: _only("") = None  # type: ignore[valid-type]
    best_of: _only(1) = None  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n_each

    @property
    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def support(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _few_choices(self) -> CompletionRequest:
        if self.choices > MOST_CHOICES:
            raise ValueError(f"prompt: {self.choices} choices, prompts times n; at most {MOST_CHOICES}")
        return self


class InputMessage(Turn):
    """A message of the Responses API's input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    id: str | None = None
    status: str | None = None


class TextFormat(Body):
    format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    verbosity: _only("medium") = None  # type: ignore[valid-type]


class ResponsesRequest(Decoded):
    """The Responses API, text only. Nothing is stored, whatever `store` says: a conversation is sent whole."""

    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Whole | None = Field(None, ge=1)
    text: TextFormat | None = None
    store: bool | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: bool | None = None
    max_tool_calls: Whole | None = None
    truncation: _only("disabled") = None  # type: ignore[valid-type]
    background: _only(False) = None  # type: ignore[valid-type]
    reasoning: _only({}, {"effort": "none"}) = None  # type: ignore[valid-type]
    top_logprobs: _only(0) = None  # type: ignore[valid-type]
    previous_response_id: _only() = None  # type: ignore[valid-type]
    conversation: _only() = None  # type: ignore[valid-type]
    prompt: _only() = None  # type: ignore[valid-type]

    @property
    def limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as a chat."""
        head = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, {"role": "user", "content": self.input}]
        return [*head, *(message.plain() for message in self.input)]


class ScoreRequest(Body):
    """A state to decide: a chat's, where the answer is about to begin or goes on behind `answer`, or a text's or token
    ids' end."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    answer: str = ""
    prompt: str | list[Whole] | None = None
    seed: Whole | None = Field(None, ge=-1, lt=2**63)
    user: str | None = None

    @model_validator(mode="after")
    def _one_state(self) -> ScoreRequest:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("messages: send either messages or a prompt")
        if self.answer and self.messages is None:
            raise ValueError("answer: it goes with messages")
        return self


R = TypeVar("R", bound=Body)


def read(kind: type[R], body: bytes) -> R:
    """The request in an HTTP body. Raises ApiError (400) naming the field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False)
    # Of a union's members the one that got furthest is the one that was meant.
    root = _field(problems[0]["loc"])
    problem = max((p for p in problems if _field(p["loc"]).startswith(root)), key=lambda p: len(p["loc"]))
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {problem['ctx']['error']}", code="invalid_json")
    field = _field(problem["loc"])
    if problem["type"] == "value_error":
        reason = str(problem["ctx"]["error"])  # a check of several fields names them itself
        named = field or reason.partition(":")[0]
        return ApiError(400, f"{field}: {reason}" if field else reason, param=named, code="invalid_value")
    if not field:
        return ApiError(400, "the body is not a JSON object", code="invalid_json")
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"{field}: unknown or unsupported field", param=field, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"{field}: this field is required", param=field, code="missing_required_parameter")
    if any(other["type"] == "too_short" for other in problems if _field(other["loc"]) == field):
        return ApiError(400, f"{field}: it is empty", param=field, code="invalid_value")
    wanted = " or ".join(dict.fromkeys(other["msg"] for other in problems if _field(other["loc"]) == field))
    wanted = wanted.replace(" or Input should be", " or")
    return ApiError(400, f"{field}: {wanted[0].lower()}{wanted[1:]}", param=field, code="invalid_value")


def _field(location: tuple[int | str, ...]) -> str:
    """`messages.0.content` of pydantic's location, which also names the union member tried ("str", "list[int]")."""
    first, rest = location[:1], location[1:]
    return ".".join(str(part) for part in (*first, *(p for p in rest if p != "str" and not str(p).startswith("list["))))
