"""An engine service without an engine: it answers by a rule, and keeps what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from gearshift.data.text import has_stop
from gearshift.models.tiny import tiny_tokenizer
from gearshift.serve.metrics import Metrics
from gearshift.serve.openai import openai_routes
from gearshift.serve.policies import Policies, Policy
from gearshift.types import Completion, SamplingParams

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id


@dataclass
class Token:
    token: int
    logprob: float
    drawn_logprob: float
    raw_logprob: float | None
    top: tuple[tuple[int, float], ...]
    weights_version: int
    finish_reason: str | None
    cached_tokens: int = 0


@dataclass
class Score:
    logprob: float
    top: tuple[tuple[int, float], ...]


class FakeService:
    """Says `words`, then ends; `hold` makes each token wait."""

    def __init__(self, words: str = "Hello, wörld!", hold: asyncio.Event | None = None) -> None:
        self.words, self.hold = words, hold
        self.asked: list[tuple[list[int], SamplingParams, int, int]] = []
        self.waiting = self.running = 0
        self.weights_version, self.max_length, self.gear = 3, 512, "generation"
        self.left = 0
        self.fails_at: int | None = None
        self.cached = 0

    def tokens(self, params: SamplingParams) -> list[Token]:
        ids = [*TOKENIZER.encode(self.words), END]
        found: list[Token] = []
        for i, token in enumerate(ids[: params.max_new_tokens]):
            said = ids[: i + 1]
            stopped = token == END or (params.stop and has_stop(TOKENIZER, said, params.stop))
            last = i + 1 == params.max_new_tokens
            top = tuple((7 + j, -1.0 - j) for j in range(params.top_logprobs or 0))
            raw = None if params.top_logprobs is None else -0.5
            reason = "stop" if stopped else "length" if last else None
            version = self.weights_version
            found.append(Token(token, -0.25, -0.125, raw, top, version, reason, self.cached))
            if reason:
                break
        return found

    async def generate(
        self, token_ids: list[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        tokens = [t async for t in self.stream(token_ids, params, request_id, sample)]
        raw = [] if params.top_logprobs is None else [-0.5] * len(tokens)
        reason: Any = tokens[-1].finish_reason
        return Completion(
            [t.token for t in tokens], [-0.25] * len(tokens), [-0.125] * len(tokens), reason,
            [self.weights_version] * len(tokens), raw, [t.top for t in tokens] if raw else [],
            tokens[0].cached_tokens,
        )  # fmt: skip

    async def stream(
        self, token_ids: list[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> AsyncGenerator[Token, None]:
        self.asked.append((list(token_ids), params, request_id, sample))
        self.running += 1
        try:
            for i, token in enumerate(self.tokens(params)):
                if self.fails_at == i:
                    raise RuntimeError("no memory for /home/weights")
                await (self.hold.wait() if self.hold else asyncio.sleep(0))
                yield token
        finally:
            self.running -= 1
            self.left += 1

    async def score(self, token_ids: list[int], top: int) -> list[Score]:
        return [Score(-1.0 * t, ((t, -1.0 * t),)[:top]) for t in token_ids[1:]]


def fake_routes(service: FakeService | Callable[[], Any], **more: Any) -> tuple[list[Any], Metrics]:
    """The routes of one policy that this service answers for."""
    metrics = Metrics()
    policy = Policy("policy", service, TOKENIZER, end_tokens=frozenset([END]), **more)  # type: ignore[arg-type]
    return [*openai_routes(Policies([policy]), metrics), *metrics.routes()], metrics
