"""OpenAI's wire: chats, the list of models, and the routes of all its endpoints.

The parts that this file puts together know nothing of each other: `completions.py` has the endpoint
for plain prompts, `tokens.py` those about tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from gearshift.serve.answering import Ask, Record, logprob_entry, make_ask, record_of, usage
from gearshift.serve.body import json_object
from gearshift.serve.completions import completions_route
from gearshift.serve.events import EventStream
from gearshift.serve.metrics import Metrics
from gearshift.serve.openapi import openapi_route
from gearshift.serve.policies import Policies, Policy
from gearshift.serve.settings import ServerSettings
from gearshift.serve.tokens import token_routes
from gearshift.serve.wire import ChatRequest, check_fields, messages_of, parse
from gearshift.types import Completion


def openai_routes(policies: Policies, metrics: Metrics) -> list[BaseRoute]:
    """The endpoints under `/v1`, those about tokens, and `/openapi.json`."""

    async def chat(request: Request) -> Response:
        return await _chat(request, policies, metrics)

    async def models(_: Request) -> Response:
        found = [_model(policy) for policy in policies]
        return JSONResponse({"object": "list", "data": found, "models": found})

    async def model(request: Request) -> Response:
        return JSONResponse(_model(policies.get(request.path_params["name"])))

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        completions_route(policies, metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name}", model),
        *token_routes(policies),
        openapi_route(),
    ]


def _model(policy: Policy) -> dict[str, Any]:
    found = {"id": policy.name, "object": "model", "created": 0, "owned_by": "gearshift"}
    return {
        **found,
        "max_model_len": policy.service.max_length,
        "fingerprint": policy.fingerprint(),
    }


async def _chat(http: Request, policies: Policies, metrics: Metrics) -> Response:
    settings: ServerSettings = http.app.state.settings
    request = parse(ChatRequest, await json_object(http))
    metrics.ignored(len(check_fields(request, settings.strict)))
    policy = policies.get(request.model)
    messages, options = messages_of(request.messages), request.chat_template_kwargs or {}
    continues = request.continue_final_message
    if continues is None and request.add_generation_prompt is False:
        continues = True
    prompt = await anyio.to_thread.run_sync(
        policy.prompt, messages, options, request.reasoning_effort, continues
    )
    ask = make_ask(http, request, policy, prompt, request.top, metrics)
    head = {"id": f"chatcmpl-{uuid4().hex[:24]}", "created": int(time.time()), "model": policy.name}
    if request.stream:
        return EventStream(_Stream(ask, request, head).events())
    completions = await ask.completions()
    return JSONResponse(
        {
            **head,
            "object": "chat.completion",
            "system_fingerprint": policy.fingerprint(),
            "choices": [_choice(ask, request, i, c) for i, c in enumerate(completions)],
            "usage": usage([ask], sum(len(c.token_ids) for c in completions)),
        }
    )


def _choice(ask: Ask, request: ChatRequest, index: int, completion: Completion) -> dict[str, Any]:
    text = ask.text()
    content = "".join([*(text.add(token) for token in completion.token_ids), text.end()])
    names = ask.policy.names
    choice: dict[str, Any] = {
        "index": index,
        "message": {"role": "assistant", "content": content, "refusal": None},
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if request.top is not None:
        rows = zip(
            completion.token_ids, completion.raw_logprobs, completion.top_logprobs, strict=True
        )
        content_of = [logprob_entry(names, token, raw, top) for token, raw, top in rows]
        choice["logprobs"] = {"content": content_of, "refusal": None}
    if request.gearshift.tokens:
        choice["gearshift"] = record_of(completion).to_json(ask.prompt)
    return choice


class _Stream:
    """The events of one streamed chat."""

    def __init__(self, ask: Ask, request: ChatRequest, head: dict[str, Any]) -> None:
        self.ask, self.request = ask, request
        self.usage = bool(request.stream_options and request.stream_options.include_usage)
        self.head = {**head, "object": "chat.completion.chunk"}
        self.head["system_fingerprint"] = ask.policy.fingerprint()
        if self.usage:
            self.head["usage"] = None
        self.texts = [ask.text() for _ in range(ask.n)]
        self.records = [Record() for _ in range(ask.n)]
        self.held: list[list[dict[str, Any]]] = [[] for _ in range(ask.n)]
        """Log-probs of tokens whose text is not sent yet."""

    async def events(self) -> AsyncGenerator[str, None]:
        """The first chunk of each choice, its text, its end; then the usage."""
        for index in range(self.ask.n):
            yield self._event(index, {"role": "assistant", "content": ""})
        async with aclosing(self.ask.stream()) as tokens:
            async for index, sampled in tokens:
                if sampled is None:
                    yield self._end(index)
                    continue
                self.records[index].add(sampled)
                if self.request.top is not None:
                    raw = sampled.raw_logprob if sampled.raw_logprob is not None else 0.0
                    entry = logprob_entry(self.ask.policy.names, sampled.token, raw, sampled.top)
                    self.held[index].append(entry)
                if piece := self.texts[index].add(sampled.token):
                    yield self._event(index, {"content": piece})
        generated = sum(len(record.token_ids) for record in self.records)
        self.ask.metrics.tokens("generated", generated)
        if self.usage:
            yield _data({**self.head, "choices": [], "usage": usage([self.ask], generated)})
        yield "data: [DONE]\n\n"

    def _end(self, index: int) -> str:
        record, text = self.records[index], self.texts[index]
        rest = text.end()
        before = self._event(index, {"content": rest}) if rest or self.held[index] else ""
        finish = record.finish_reason
        extra = (
            {"gearshift": record.to_json(self.ask.prompt)} if self.request.gearshift.tokens else {}
        )
        return before + self._event(index, {}, finish, **extra)

    def _event(
        self, index: int, delta: dict[str, Any], finish: str | None = None, **more: Any
    ) -> str:
        logprobs = None
        if self.held[index]:
            logprobs, self.held[index] = {"content": self.held[index], "refusal": None}, []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return _data({**self.head, "choices": [{**choice, **more}]})


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
