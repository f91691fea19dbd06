"""What an OpenAI endpoint says, checked: its models, its answers, its errors.

The endpoint may be anyone's. A reply is read leniently where servers differ (no `usage`, `content: null`) and refused
with a reason where it makes no sense; nothing it says raises anything but EndpointError. The `s2t` extension is what
this project's gateway adds.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

from pipelines.data.text import encodable
from s2t_models.errors import UserError, one_line
from serving import http
from serving.http import base_url

#: A longer reply is refused: an endpoint must not fill the memory. Ten thousand decisions take a few MiB.
LONGEST_REPLY = 64 * 1024**2
#: What a model's entry says differently at each call.
_PASSING = ("created", "permission")


class EndpointError(UserError):
    """The endpoint cannot be asked, or its reply makes no sense; the message is one line."""


Text = Annotated[str, BeforeValidator(lambda value: encodable(value) if isinstance(value, str) else value)]
Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Message(BaseModel):
    content: Text | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: Text | None = None


class _TokenUsage(BaseModel):
    completion_tokens: Count | None = None


class _Decision(BaseModel):
    """One triggered step, as the gateway reports it. JSON has no infinity: it comes as null."""

    model_config = ConfigDict(extra="allow")

    step: Count
    value: float | None = None
    candidates_K: list[Count]
    logprobs_K: list[float | None]
    scores_K: list[float | None]
    preferences_K: list[float | None]
    chosen: Count
    argmax: Count | None = None
    teacher_K: list[float | None] | None = None


class _Extension(BaseModel):
    usage: dict[Text, dict[Text, Count]] = {}
    seconds: FiniteFloat = 0.0
    models: dict[Text, Text] = {}
    samples: list[Text] | None = None
    decisions: list[_Decision] | None = None
    spans: list[tuple[Text, Count]] | None = None
    ids: list[Count] | None = None


class Reply(BaseModel):
    """A chat completion. Only the first choice counts."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _TokenUsage | None = None
    s2t: _Extension | None = None

    @property
    def text(self) -> str:
        """Empty where the content is null."""
        return self.choices[0].message.content or ""

    @property
    def finish(self) -> str:
        """`stop` where the endpoint gives no reason."""
        return self.choices[0].finish_reason or "stop"

    @property
    def tokens(self) -> int:
        """Tokens of the answer; 0 where the endpoint does not count them."""
        return (self.usage.completion_tokens if self.usage else None) or 0


class _ModelEntry(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str
    needs: list[str] = []


class _ModelList(BaseModel):
    data: list[_ModelEntry]


class _Health(BaseModel):
    engines: dict[str, dict[str, Any]] = {}


def read_reply(body: bytes) -> Reply:
    """The chat completion in a response's body. Raises EndpointError with the first thing that is wrong with it."""
    try:
        # Not model_validate_json, which refuses a lone surrogate.
        return Reply.model_validate(json.loads(body.decode("utf-8-sig", errors="replace")))
    except ValidationError as error:
        reason = _first(error)
    except (ValueError, RecursionError):
        reason = f"not JSON: {_shown(body.decode(errors='replace'))}"
    raise EndpointError(f"the reply is not a chat completion: {reason}") from None


def merge(extensions: list[_Extension | None]) -> dict[str, Any]:
    """The `s2t` objects of a question's turns as one: costs add up, lists follow each other. Empty where the endpoint
    has none."""
    merged: dict[str, Any] = {}
    for extension in extensions:
        if extension is None:
            continue
        usage = merged.setdefault("usage", {})
        for engine, cost in extension.usage.items():
            old = usage.get(engine, {})
            usage[engine] = old | {kind: old.get(kind, 0) + number for kind, number in cost.items()}
        merged["seconds"] = merged.get("seconds", 0.0) + extension.seconds
        merged["models"] = merged.get("models", {}) | extension.models
        lists = extension.model_dump(include={"decisions", "spans", "samples"})
        for name, values in lists.items():
            merged[name] = merged.get(name, []) + (values or [])
    if len(extensions) == 1 and extensions[0]:  # the ids of several turns belong to several prompts
        merged["ids"] = extensions[0].ids
    return merged


def read_error(text: str) -> tuple[str, str | None]:
    """(message in one line of at most 300 characters, code) of an error response."""
    code = None
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        error = json.loads(text)["error"]
        text = error if isinstance(error, str) else error["message"]
        code = error.get("code") if isinstance(error, dict) else None
    return _shown(str(text)) or "no message", code if isinstance(code, str) else None


def served_models(endpoint: str, names: Iterable[str], api_key: str = "") -> dict[str, dict[str, Any]]:
    """What the endpoint says about each model of `names`: its /v1/models entry, and the weight and tokenizer hashes of
    the engines it needs where the server has them (/health). Raises EndpointError where nothing answers there, or a
    model is not served."""
    url, names = base_url(endpoint), list(names)
    try:
        with http.client(url, timeout=60, headers=http.authorization(api_key)) as client:
            response = client.get(f"{url}/models")
            response.raise_for_status()
            entries = {entry.id: entry for entry in _ModelList.model_validate_json(response.content).data}
            for name in dict.fromkeys(names):
                # A name with settings of its own (s2t@0.05) need not be listed to be served.
                if name not in entries and (response := client.get(f"{url}/models/{name}")).is_success:
                    entries[name] = _ModelEntry.model_validate_json(response.content)
            engines = _engines(client.get(f"{url.removesuffix('/v1')}/health"))
    except ValidationError as error:
        reason = f"its list of models: {_first(error)}"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: a proxy of the environment is none
        reason = _shown(one_line(error, 200))
    else:
        missing = [name for name in names if name not in entries]
        if missing:
            there = ", ".join(map(encodable, entries)) or "nothing"
            raise EndpointError(f"{url} does not serve {', '.join(missing)}; it serves {there}")
        return {name: _lasting(entries[name], engines) for name in names}
    raise EndpointError(f"{url}: no OpenAI endpoint answers there ({reason})")


def _engines(health: httpx.Response) -> dict[str, dict[str, Any]]:
    """The engines of this project's server; another one says something else on /health, if anything. Raises
    HTTPStatusError where the server says that it is not ready."""
    if health.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        health.raise_for_status()
    try:
        return _Health.model_validate_json(health.content).engines if health.is_success else {}
    except ValidationError:
        return {}


def _lasting(entry: _ModelEntry, engines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    said = {key: value for key, value in entry.model_dump().items() if key not in _PASSING}
    return said | {"engines": {name: engines[name] for name in entry.needs if name in engines}}


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    return _shown(f"{field}: {problem['msg']}" if field else problem["msg"])


def _shown(text: str) -> str:
    return " ".join(encodable(text[:2000]).split())[:300]
