"""`/openapi.json`: the endpoints' description, made of the pydantic models of the requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gearshift.serve.wire import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatRequest, "Answers to a conversation"),
    "/v1/completions": (CompletionRequest, "Continuations of prompts"),
    "/tokenize": (TokenizeRequest, "The tokens of a text or a conversation"),
    "/detokenize": (DetokenizeRequest, "The text of tokens"),
}
_GETS = {
    "/v1/models": "The served models",
    "/v1/models/{name}": "One served model",
    "/tokenizer_info": "The tokenizer's special tokens and template",
    "/health": "Whether the server is ready",
    "/metrics": "Figures in Prometheus' form",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_REFUSALS = (
    "400",
    "401",
    "403",
    "404",
    "405",
    "408",
    "411",
    "413",
    "415",
    "417",
    "429",
    "431",
    "500",
    "503",
)


def openapi() -> dict[str, Any]:
    """The whole description."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (model, summary) in _POSTS.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
        content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
        body = {"required": True, "content": {"application/json": content}}
        kinds = ["application/json"] + ["text/event-stream"] * path.startswith("/v1/")
        paths[path] = {"post": {**_operation(summary, kinds), "requestBody": body}}
    for path, summary in _GETS.items():
        operation = _operation(
            summary, ["text/plain" if path == "/metrics" else "application/json"]
        )
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [name]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Gearshift", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _operation(summary: str, kinds: list[str]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {code: {"description": "An error", "content": error} for code in _REFUSALS}
    good = {"description": summary, "content": {kind: {} for kind in kinds}}
    return {"summary": summary, "responses": {"200": good, **refusals}}


def openapi_route() -> Route:
    """The route of the description."""
    description = openapi()

    async def show(_: Request) -> Response:
        return JSONResponse(description)

    return Route("/openapi.json", show)
