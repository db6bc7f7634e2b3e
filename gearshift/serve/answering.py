"""Runs a request on a policy's engine: its limits, its samples at once or as a stream, its figures.

Chats and completions share this; it knows no field of a wire but those that both have.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from starlette.requests import Request

from gearshift.engine.service import SampledToken
from gearshift.errors import CapacityError, ConfigError
from gearshift.runtime.terminal import one_line
from gearshift.serve.api_error import ApiError
from gearshift.serve.metrics import Metrics
from gearshift.serve.policies import Policy
from gearshift.serve.settings import ServerSettings
from gearshift.serve.token_text import TextStream, TokenNames
from gearshift.serve.wire import SamplingRequest
from gearshift.types import Completion, SamplingParams

T = TypeVar("T")
LOWEST = -9999.0
"""What stands for the log-prob of a token that cannot be drawn, because JSON has no infinity."""


@dataclass
class Ask:
    """What one request asks of a policy."""

    policy: Policy
    prompt: list[int]
    params: SamplingParams
    n: int
    request_id: int
    metrics: Metrics
    cached: int = 0
    """Prompt tokens that no answer had to compute, known once there are tokens."""

    def text(self) -> TextStream:
        """The text of one of its answers, to be made of tokens."""
        policy, p = self.policy, self.params
        whole = policy.names.changes_text
        return TextStream(policy.tokenizer, p.stop, whole, p.min_new_tokens)

    async def completions(self) -> list[Completion]:
        """All its answers."""
        service = self.policy.service
        self.metrics.tokens("prompt", len(self.prompt))
        found = await gather(
            service.generate(self.prompt, self.params, self.request_id, i) for i in range(self.n)
        )
        self.metrics.tokens("generated", sum(len(c.token_ids) for c in found))
        self._count_cached(min(c.cached_tokens for c in found))
        if any(c.finish_reason == "abort" for c in found):
            raise _aborted()
        return found

    async def stream(self) -> AsyncGenerator[tuple[int, SampledToken | None], None]:
        """(number of the answer, a token) as they are sampled; None after an answer's last one."""
        began = last = time.monotonic()
        self.metrics.tokens("prompt", len(self.prompt))
        first = True
        async with aclosing(self._merged() if self.n > 1 else self._sample(0)) as samples:
            async for index, sampled in samples:
                if sampled is not None:
                    if first:  # by the answer for which the prompt was computed
                        self._count_cached(sampled.cached_tokens)
                    now = time.monotonic()
                    self.metrics.token_seconds(now - (began if first else last), first)
                    first, last = False, now
                yield index, sampled

    async def _sample(self, index: int) -> AsyncGenerator[tuple[int, SampledToken | None], None]:
        stream = self.policy.service.stream(self.prompt, self.params, self.request_id, index)
        async with aclosing(cast(AsyncGenerator[SampledToken, None], stream)):
            async for sampled in stream:
                yield index, sampled
        yield index, None

    async def _merged(self) -> AsyncGenerator[tuple[int, SampledToken | None], None]:
        queue: asyncio.Queue[tuple[int, SampledToken | None]] = asyncio.Queue()

        async def pump(index: int) -> None:
            async with aclosing(self._sample(index)) as samples:
                async for item in samples:
                    queue.put_nowait(item)

        pumps = asyncio.ensure_future(gather(pump(i) for i in range(self.n)))
        try:
            left = self.n
            while left:
                taken = asyncio.ensure_future(queue.get())
                await asyncio.wait({taken, pumps}, return_when=asyncio.FIRST_COMPLETED)
                if not taken.done() and pumps.exception():
                    taken.cancel()
                    pumps.result()
                item = await taken
                left -= item[1] is None
                yield item
        finally:
            pumps.cancel()
            await asyncio.wait({pumps})

    def _count_cached(self, tokens: int) -> None:
        self.cached = tokens
        self.metrics.tokens("cached", tokens)


def usage(asks: Iterable[Ask], generated: int) -> dict[str, Any]:
    """The numbers of tokens of these prompts and of their answers."""
    asks = list(asks)
    prompt, cached = sum(len(ask.prompt) for ask in asks), sum(ask.cached for ask in asks)
    found = {"prompt_tokens": prompt, "completion_tokens": generated}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return {**found, "total_tokens": prompt + generated, **details}


@dataclass
class Record:
    """The tokens of one answer with their figures, as `"gearshift": {"tokens": true}` asks."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drawn_logprobs: list[float] = field(default_factory=list)
    weights_versions: list[int] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, sampled: SampledToken) -> None:
        """Add one token of a stream."""
        self.token_ids.append(sampled.token)
        self.logprobs.append(sampled.logprob)
        self.drawn_logprobs.append(sampled.drawn_logprob)
        self.weights_versions.append(sampled.weights_version)
        if sampled.finish_reason == "abort":
            raise _aborted()
        self.finish_reason = sampled.finish_reason or self.finish_reason

    def to_json(self, prompt: list[int]) -> dict[str, Any]:
        """The field `gearshift` of a choice."""
        return {
            "prompt_token_ids": prompt,
            "token_ids": self.token_ids,
            "logprobs": [max(x, LOWEST) for x in self.logprobs],
            "drawn_logprobs": [max(x, LOWEST) for x in self.drawn_logprobs],
            "weights_version": self.weights_versions[-1] if self.weights_versions else None,
            "weights_versions": self.weights_versions,
        }


def record_of(completion: Completion) -> Record:
    """The record of a whole answer."""
    return Record(
        completion.token_ids,
        completion.logprobs,
        completion.drawn_logprobs,
        completion.weights_versions,
    )


def make_ask(
    http: Request,
    request: SamplingRequest,
    policy: Policy,
    prompt: list[int],
    top: int | None,
    metrics: Metrics,
) -> Ask:
    """Check the limits. Raises `ApiError`: 400 where prompt and answer do not fit into the model,
    429 where too many requests wait.
    """
    settings: ServerSettings = http.app.state.settings
    check_room(policy, settings)
    longest = policy.service.max_length
    left, wanted = longest - len(prompt), request.wanted
    if not prompt:
        raise ApiError(400, "invalid_value", "the prompt has no tokens", "prompt")
    if left < (wanted or 1):
        words = f"the prompt has {len(prompt)} tokens"
        words += f" and the answer may have {wanted}" if wanted else ""
        words += f"; this model's maximum context length is {longest} tokens"
        raise ApiError(400, "context_length_exceeded", words, request.asked_in)
    named = {request.asked_in: prompt, "stop_token_ids": request.stop_token_ids or ()}
    for name, tokens in {**named, "logit_bias": dict(request.bias())}.items():
        if (worst := max(tokens, default=0)) >= policy.names.count:
            raise ApiError(400, "invalid_value", f"the token {worst} does not exist", name)
    most = wanted or min(left, settings.default_tokens)
    if (request.min_tokens or 0) > most:
        words = f"min_tokens is {request.min_tokens}, and the answer may have at most {most} tokens"
        raise ApiError(400, "invalid_value", words, "min_tokens")
    params = request.params(most, top, policy.end_tokens)
    request_id = policy.next_id() if request.seed is None else 0
    http.scope["state"]["model"] = policy.name
    return Ask(policy, prompt, params, request.n or 1, request_id, metrics)


def check_room(policy: Policy, settings: ServerSettings) -> None:
    """Raise `ApiError` with status 429 if too many requests wait for the engine."""
    if policy.service.waiting >= settings.max_waiting:
        words = f"more than {settings.max_waiting} requests wait; send it again later"
        again = {"Retry-After": "2", "x-should-retry": "true"}
        raise ApiError(429, "server_busy", words, headers=again)


async def gather(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first error ends the others. The engine's errors about the request
    itself become `ApiError`.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    except (CapacityError, ConfigError) as error:
        raise ApiError(400, "invalid_value", one_line(str(error))) from error
    finally:
        for task in tasks:
            task.cancel()


def _aborted() -> ApiError:
    return ApiError(503, "not_ready", "the engine ended this request; send it again")


def logprob_entry(
    names: TokenNames, token: int, logprob: float, top: Iterable[tuple[int, float]]
) -> dict[str, Any]:
    """One token in a chat's `logprobs.content`."""
    entry = _named(names, token, logprob)
    return {**entry, "top_logprobs": [_named(names, other, value) for other, value in top]}


def _named(names: TokenNames, token: int, logprob: float) -> dict[str, Any]:
    found = {"token": names.text(token), "logprob": max(logprob, LOWEST)}
    return {**found, "bytes": list(names.bytes(token))}
