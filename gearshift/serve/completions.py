"""`POST /v1/completions`: plain prompts, as texts or token ids, with log-probs on demand."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any
from uuid import uuid4

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gearshift.data.text import decode, replace_surrogates
from gearshift.serve.answering import (
    LOWEST,
    Ask,
    Record,
    gather,
    make_ask,
    record_of,
    usage,
)
from gearshift.serve.api_error import ApiError
from gearshift.serve.body import json_object
from gearshift.serve.events import EventStream
from gearshift.serve.metrics import Metrics
from gearshift.serve.policies import Policies, Policy
from gearshift.serve.settings import ServerSettings
from gearshift.serve.token_text import TokenNames
from gearshift.serve.wire import CompletionRequest, check_fields, parse
from gearshift.types import Completion

_MOST_PROMPTS, _MOST_ANSWERS = 128, 1024
Row = tuple[int, float | None, Sequence[tuple[int, float]]]
"""(token, its log-prob, the most likely tokens in its place)."""


def completions_route(policies: Policies, metrics: Metrics) -> Route:
    """The endpoint."""

    async def completions(http: Request) -> Response:
        settings: ServerSettings = http.app.state.settings
        request = parse(CompletionRequest, await json_object(http))
        metrics.ignored(len(check_fields(request, settings.strict)))
        if request.best_of not in (None, request.n or 1):
            raise ApiError(400, "unsupported_parameter", "best_of must equal n", "best_of")
        policy = policies.get(request.model)
        prompts = await anyio.to_thread.run_sync(partial(_prompts, request, policy))
        if request.max_tokens == 0 and not request.echo:
            raise ApiError(400, "invalid_value", "max_tokens is 0 only with echo", "max_tokens")
        asks = [make_ask(http, request, policy, p, request.logprobs, metrics) for p, _ in prompts]
        head = {"id": f"cmpl-{uuid4().hex[:24]}", "created": int(time.time())}
        head |= {"object": "text_completion", "model": policy.name}
        head["system_fingerprint"] = policy.fingerprint()
        if request.stream:
            return EventStream(_events(asks, request, head, [text for _, text in prompts]))
        found = await gather(_answers(ask, request, text) for ask, (_, text) in _zip(asks, prompts))
        choices = [choice for choices, _ in found for choice in choices]
        numbers = usage(asks, sum(generated for _, generated in found))
        numbered = [{**choice, "index": i} for i, choice in enumerate(choices)]
        return JSONResponse({**head, "choices": numbered, "usage": numbers})

    return Route("/v1/completions", completions, methods=["POST"])


def _zip(asks: list[Ask], prompts: list[tuple[list[int], str]]) -> Any:
    return zip(asks, prompts, strict=True)


def _prompts(request: CompletionRequest, policy: Policy) -> list[tuple[list[int], str]]:
    """The (tokens, text) of each prompt."""
    given: Any = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= _MOST_PROMPTS or len(given) * (request.n or 1) > _MOST_ANSWERS:
        words = (
            f"prompt must have 1 to {_MOST_PROMPTS} prompts, with at most {_MOST_ANSWERS} answers"
        )
        raise ApiError(400, "invalid_value", words, "prompt")
    found = []
    for prompt in given:
        if isinstance(prompt, str):
            text = replace_surrogates(prompt)
            special = (request.model_extra or {}).get("add_special_tokens", True) is not False
            found.append((policy.tokenizer.encode(text, add_special_tokens=special), text))
        else:
            found.append((prompt, decode(policy.tokenizer, prompt) if request.echo else ""))
    return found


async def _answers(
    ask: Ask, request: CompletionRequest, prompt_text: str
) -> tuple[list[dict[str, Any]], int]:
    """The choices of one prompt, and how many tokens they have."""
    before = await _echoed(ask, request)
    found = [] if request.max_tokens == 0 else await ask.completions()
    if request.max_tokens == 0:
        found = [Completion([], [], [], "length", [])] * ask.n
    choices = []
    for completion in found:
        stream = ask.text()
        text = "".join([*(stream.add(token) for token in completion.token_ids), stream.end()])
        choice: dict[str, Any] = {"text": (prompt_text if request.echo else "") + text}
        choice["finish_reason"] = completion.finish_reason
        rows = [*before, *_rows(completion)]
        choice["logprobs"] = (
            _logprobs(ask.policy.names, rows) if request.logprobs is not None else None
        )
        if request.gearshift.tokens:
            choice["gearshift"] = record_of(completion).to_json(ask.prompt)
        choices.append(choice)
    return choices, sum(len(c.token_ids) for c in found)


async def _echoed(ask: Ask, request: CompletionRequest) -> list[Row]:
    """The prompt's tokens with their log-probs; the first one has none."""
    if not request.echo or request.logprobs is None:
        return []
    [scores] = await gather([ask.policy.service.score(ask.prompt, request.logprobs)])
    rows: list[Row] = [(ask.prompt[0], None, ())]
    return rows + [(t, s.logprob, s.top) for t, s in zip(ask.prompt[1:], scores, strict=True)]


def _rows(completion: Completion) -> list[Row]:
    if not completion.raw_logprobs:
        return []
    rows = zip(completion.token_ids, completion.raw_logprobs, completion.top_logprobs, strict=True)
    return [(token, raw, top) for token, raw, top in rows]


def _logprobs(names: TokenNames, rows: list[Row], offset: int = 0) -> dict[str, Any]:
    """OpenAI's four lists. `top_logprobs` has the token itself too, as OpenAI's has."""
    found: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for token, logprob, top in rows:
        text = names.text(token)
        found["tokens"].append(text)
        found["token_logprobs"].append(None if logprob is None else max(logprob, LOWEST))
        found["text_offset"].append(offset)
        offset += len(text)
        if logprob is None:
            found["top_logprobs"].append(None)
            continue
        best: dict[str, float] = {}
        for other, value in (*top, (token, logprob)):
            name = names.text(other)
            best[name] = max(value, best.get(name, LOWEST))
        found["top_logprobs"].append(best)
    return found


async def _events(
    asks: list[Ask], request: CompletionRequest, head: dict[str, Any], texts: list[str]
) -> AsyncGenerator[str, None]:
    """The events of a stream: one prompt after the other, each with its `n` answers at once."""
    counted = bool(request.stream_options and request.stream_options.include_usage)
    if counted:
        head = {**head, "usage": None}
    generated = 0
    for number, ask in enumerate(asks):
        first = number * ask.n
        before = await _echoed(ask, request)
        for index in range(ask.n if request.echo else 0):
            logprobs = _logprobs(ask.policy.names, before) if before else None
            yield _event(head, first + index, texts[number], logprobs)
        if request.max_tokens == 0:
            for index in range(ask.n):
                yield _event(head, first + index, "", None, "length")
            continue
        streams, records = [ask.text() for _ in range(ask.n)], [Record() for _ in range(ask.n)]
        offsets = [len(texts[number]) if request.echo else 0] * ask.n
        async with aclosing(ask.stream()) as tokens:
            async for index, sampled in tokens:
                text, record = streams[index], records[index]
                if sampled is None:
                    finish = record.finish_reason
                    extra = (
                        {"gearshift": record.to_json(ask.prompt)}
                        if request.gearshift.tokens
                        else {}
                    )
                    yield _event(head, first + index, text.end(), None, finish, **extra)
                    continue
                record.add(sampled)
                piece, logprobs = text.add(sampled.token), None
                if request.logprobs is not None:
                    row = (sampled.token, sampled.raw_logprob, sampled.top)
                    logprobs = _logprobs(ask.policy.names, [row], offsets[index])
                    offsets[index] += len(logprobs["tokens"][0])
                if piece or logprobs:
                    yield _event(head, first + index, piece, logprobs)
        generated += sum(len(record.token_ids) for record in records)
        ask.metrics.tokens("generated", sum(len(record.token_ids) for record in records))
    if counted:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(asks, generated)})}\n\n"
    yield "data: [DONE]\n\n"


def _event(
    head: dict[str, Any],
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish: str | None = None,
    **more: Any,
) -> str:
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, **more}
    return f"data: {json.dumps({**head, 'choices': [choice]}, ensure_ascii=False)}\n\n"
