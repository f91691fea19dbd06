"""The OpenAPI document of a gateway: its routes, and the bodies that they read and write.

Routes read their bodies themselves, so that errors have OpenAI's shape, and FastAPI knows nothing of them. The schemas
are those of `openai_protocol` and `openai_answers`, as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving import openai_answers as answers
from serving import openai_protocol as api
from serving.limits import OPEN

#: What a route reads and what it writes, by its path.
BODIES: dict[str, tuple[type[BaseModel] | None, type[BaseModel] | None]] = {
    "/v1/chat/completions": (api.ChatRequest, answers.ChatResponse),
    "/v1/completions": (api.CompletionRequest, answers.CompletionResponse),
    "/v1/score": (api.ScoreRequest, answers.ScoreResponse),
    "/v1/responses": (api.ResponsesRequest, None),
    "/v1/models": (None, answers.ModelList),
    "/v1/models/{name}": (None, answers.ModelEntry),
}
#: The page for readers, which is no part of the API.
PAGE = "/playground"
#: Where text is written, of which kind.
TEXTS = {"/metrics": "text/plain"}
EVENTS = "text/event-stream"
ERRORS = {
    "400": "The request cannot be answered; the message names the field",
    "401": "Keys are set, and this is none of them",
    "404": "There is no such model or path",
    "413": "The body is too large",
    "429": "Too many requests wait",
    "500": "An error of the server's own",
    "503": "An engine does not answer, or the server is ending",
    "504": "The answer was not ready in time",
}
_SCHEMA = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Have the application give this document."""
    app.openapi = partial(document, app)  # type: ignore[method-assign]


def document(app: FastAPI) -> dict[str, Any]:
    """The document, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = _made(app)
    return app.openapi_schema


def _made(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = [(model, "validation") for model, _ in BODIES.values() if model]
    models += [(model, "serialization") for _, model in BODIES.values() if model]
    _, definitions = models_json_schema(models, ref_template=_SCHEMA)  # type: ignore[arg-type]
    made["components"] = {
        "schemas": definitions["$defs"] | {"Error": _error()},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    made["paths"] = {path: found for path, found in made["paths"].items() if not path.startswith(PAGE)}
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            _complete(operation, path, method)
    return made


def _complete(operation: dict[str, Any], path: str, method: str) -> None:
    """Add the bodies and errors of an operation. FastAPI's own errors are those of bodies that it would have read."""
    request, response = BODIES.get(path, (None, None))
    if request:
        operation["requestBody"] = {"required": True, "content": _content(request.__name__)}
    is_open = path in OPEN
    errors = _errors(path, method)
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if response:
        answer = _content(response.__name__)
    elif path in TEXTS:
        answer = {TEXTS[path]: {"schema": {"type": "string"}}}
    if request and "stream" in request.model_fields:
        answer |= {EVENTS: {"itemSchema": _event()}}
    operation["responses"] = {"200": {"description": "The answer", "content": answer}} | {
        status: {"description": ERRORS[status], "content": _content("Error")} | _headers(status) for status in errors
    }
    if not is_open:
        operation["security"] = [{}, {"key": []}]


def _errors(path: str, method: str) -> list[str]:
    if path in OPEN:
        return ["503"]
    statuses = ["401", "500", "503", "504"]
    if method == "post":
        statuses += ["400", "404", "413", "429"]
    elif "{" in path:
        statuses += ["404"]
    return sorted(statuses)


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA.format(model=name)}}}


def _event() -> dict[str, Any]:
    """One server-sent event, as FastAPI describes its own."""
    text = {"type": "string"}
    return {"type": "object", "properties": {"event": text, "data": text}, "required": ["data"]}


def _headers(status: str) -> dict[str, Any]:
    name, schema = {
        "401": ("WWW-Authenticate", {"type": "string"}),
        "429": ("Retry-After", {"type": "integer", "minimum": 0}),
        "503": ("Retry-After", {"type": "integer", "minimum": 0}),
    }.get(status, ("", {}))
    return {"headers": {name: {"schema": schema}}} if name else {}


def _error() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    error = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
