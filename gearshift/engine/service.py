"""One engine for many threads: requests from any event loop, which the engine's own thread steps.

    with EngineService(engine) as service:                      # a thread of its own steps
        completion = await service.generate(prompt, SamplingParams(), request_id=0)
        async for token in service.stream(prompt, SamplingParams(), request_id=0): ...

A run that samples beside its training steps them itself: `EngineService(engine, own_thread=False)`.
Its requests wait while the run trains, and go on with the newest weights. This file knows no HTTP.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from gearshift.engine.hybrid import Engine, Gear
from gearshift.engine.scheduler import Group
from gearshift.engine.sequence import Sequence
from gearshift.errors import GearshiftError
from gearshift.types import Completion, FinishReason, SamplingParams, TokenScore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token of a stream."""

    token: int
    logprob: float
    """See `Completion.logprobs`."""
    drawn_logprob: float
    """See `Completion.drawn_logprobs`."""
    weights_version: int
    finish_reason: FinishReason | None
    """Why the completion ends with this token; None before its last one."""
    raw_logprob: float | None = None
    """See `Completion.raw_logprobs`; None unless the request asks for it."""
    top: tuple[tuple[int, float], ...] = ()
    """See `Completion.top_logprobs`; empty unless the request asks for it."""
    cached_tokens: int = 0
    """See `Completion.cached_tokens`; the same with each token."""


@dataclass(slots=True, eq=False)
class _Guest:
    """A request, and the event loop that waits for it."""

    sequence: Sequence
    loop: asyncio.AbstractEventLoop
    streams: bool
    """Whether each token is awaited, or only the end."""
    tokens: deque[SampledToken] = field(default_factory=deque)
    sent: int = 0
    """Tokens that the engine's thread has sent to the event loop."""
    ended: bool = False
    waiter: asyncio.Future[None] | None = None

    def deliver(self, tokens: list[SampledToken], ended: bool) -> None:
        """Runs in the event loop."""
        self.tokens += tokens
        self.ended = self.ended or ended
        if self.waiter and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for the next delivery."""
        self.waiter = self.loop.create_future()
        try:
            await self.waiter
        finally:
            self.waiter = None


class EngineService:
    """Gives an engine's completions to any thread. It is a context manager."""

    def __init__(self, engine: Engine, own_thread: bool = True) -> None:
        """`own_thread`: a thread enters the generation gear and steps the engine while there are
        requests; nobody else can use the engine until `close`. Otherwise the thread that has the
        engine steps the requests of this service beside its own.
        """
        self._engine = engine
        self._changed = threading.Condition()
        self._arrived: list[_Guest] = []
        self._jobs: list[tuple[Callable[[], None], Future[object]]] = []
        self._guests: dict[Sequence, _Guest] = {}
        """Requests that have not ended."""
        self._unsent: dict[asyncio.AbstractEventLoop, list[_Guest]] = {}
        """New requests of this moment of an event loop, which arrive together."""
        self._closed = False
        self.running = 0
        """Requests that have a row of the engine now."""
        engine.loop.serve(self)
        self._thread = threading.Thread(target=self._run, name="engine") if own_thread else None
        if self._thread:
            self._thread.start()

    def __enter__(self) -> EngineService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Requests that have no row of the engine yet."""
        return max(0, len(self._guests) - self.running)

    @property
    def weights_version(self) -> int:
        """The version of the weights now."""
        return self._engine.weights_version

    @property
    def gear(self) -> Gear | None:
        """The engine's gear now."""
        return self._engine.gear

    @property
    def max_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self._engine.max_length

    async def generate(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        """One completion; see `GenerationBackend.generate`. A call that is cancelled ends its
        request.
        """
        guest = self._submit(token_ids, params, request_id, sample, streams=False)
        try:
            while not guest.ended:
                await guest.wait()
        finally:
            self._drop(guest)
        guest.sequence.has_ended()  # raises the error of a request that failed
        return guest.sequence.completion()

    async def stream(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> AsyncIterator[SampledToken]:
        """The tokens of the same completion as they are sampled. Closing the iterator ends the
        request.
        """
        guest = self._submit(token_ids, params, request_id, sample, streams=True)
        try:
            while True:
                while guest.tokens:
                    yield guest.tokens.popleft()
                if guest.ended:
                    break
                await guest.wait()
        finally:
            self._drop(guest)
        guest.sequence.has_ended()

    async def score(self, token_ids: Iterable[int], top: int = 0) -> list[TokenScore]:
        """See `Engine.score`. Texts are scored one at a time, and other requests advance by a token
        between two of them.
        """
        ids = self._engine.limits.scored(token_ids, top)
        return await self.call(lambda engine: engine.score(ids, top))

    async def call(self, work: Callable[[Engine], T]) -> T:
        """What `work` gives, called with the engine in its thread, between two steps."""
        done: Future[object] = Future()
        with self._changed:
            self._require_open()
            self._jobs.append((lambda: done.set_result(work(self._engine)), done))
            self._changed.notify()
        return await asyncio.wrap_future(done)  # type: ignore[arg-type]

    def close(self) -> None:
        """End all requests with an error, and the thread."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        if self._thread:
            self._thread.join()
        else:
            self._end_all()
        self._engine.loop.serve(None)

    # What follows runs in the thread that steps the engine.

    def take(self) -> list[Group]:
        """The requests that have arrived since the last call; before, one of the calls that wait
        for the engine is made.
        """
        with self._changed:
            jobs, self._jobs = self._jobs[:1], self._jobs[1:]
            arrived, self._arrived = self._arrived, []
        for work, done in jobs:
            if done.set_running_or_notify_cancel():
                try:
                    work()
                except Exception as error:  # the caller gets it
                    done.set_exception(error)
        groups: dict[tuple[int, tuple[int, ...]], Group] = {}
        for guest in arrived:
            sequence = guest.sequence
            key = sequence.request_id, tuple(sequence.prompt)
            groups.setdefault(key, []).append(sequence)
        return [*groups.values()]

    def publish(self, running: int) -> None:
        """Send the new tokens to those that wait for them, with one call to each event loop."""
        self.running = running
        news: dict[asyncio.AbstractEventLoop, list[tuple[_Guest, list[SampledToken], bool]]] = {}
        for guest in list(self._guests.values()):
            sequence, first = guest.sequence, guest.sent
            ended = sequence.finish_reason is not None
            if not (ended or (guest.streams and len(sequence.token_ids) > first)):
                continue
            tokens = _tokens(sequence, first) if guest.streams else []
            guest.sent = len(sequence.token_ids)
            news.setdefault(guest.loop, []).append((guest, tokens, ended))
            if ended:
                self._guests.pop(sequence, None)
        for loop, deliveries in news.items():
            with suppress(RuntimeError):  # that event loop has ended, and with it who waited
                loop.call_soon_threadsafe(_deliver, deliveries)

    def _run(self) -> None:
        """The engine's thread."""
        loop = self._engine.loop
        with self._engine.generating():
            while True:
                with self._changed:
                    while not (self._closed or self._arrived or self._jobs or loop.has_work):
                        self._changed.wait()
                if self._closed:
                    break
                with suppress(Exception):  # the requests have got it
                    loop.step()
            self._end_all()

    def _end_all(self) -> None:
        error = GearshiftError("The server has stopped; send the request again.")
        with self._changed:
            jobs, self._jobs, self._arrived = self._jobs, [], []
        for _, done in jobs:
            done.cancel()
        for sequence in list(self._guests):
            self._engine.loop.drop(sequence)
            sequence.fail(error)
        self.publish(0)

    # What follows runs in the event loops.

    def _submit(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, sample: int,
        streams: bool,
    ) -> _Guest:  # fmt: skip
        sequence = self._engine.limits.sequence(token_ids, params, request_id, sample)
        sequence.served = True
        guest = _Guest(sequence, loop := asyncio.get_running_loop(), streams)
        with self._changed:
            self._require_open()
            self._guests[sequence] = guest
            if loop not in self._unsent:
                loop.call_soon(self._send, loop)
            self._unsent.setdefault(loop, []).append(guest)
        return guest

    def _send(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._changed:
            self._arrived += [g for g in self._unsent.pop(loop) if g.sequence in self._guests]
            self._changed.notify()

    def _drop(self, guest: _Guest) -> None:
        """End the request before the next step, if it has not ended."""
        if self._guests.pop(guest.sequence, None) is None:
            return
        with self._changed:
            if guest in self._arrived:
                self._arrived.remove(guest)
            else:
                self._engine.loop.drop(guest.sequence)
            self._changed.notify()

    def _require_open(self) -> None:
        if self._closed:
            raise GearshiftError("The server has stopped; send the request again.")


def _tokens(sequence: Sequence, first: int) -> list[SampledToken]:
    """The tokens from this place on."""
    return [_token(sequence, i) for i in range(first, len(sequence.token_ids))]


def _token(sequence: Sequence, i: int) -> SampledToken:
    raw_logprob, top = sequence.scores[i] if sequence.scores else (None, ())
    return SampledToken(
        sequence.token_ids[i],
        sequence.logprobs[i],
        sequence.drawn_logprobs[i],
        sequence.weights_versions[i],
        sequence.finish_reason if i == len(sequence.token_ids) - 1 else None,
        raw_logprob,
        top,
        sequence.cached_tokens or 0,
    )


def _deliver(deliveries: list[tuple[_Guest, list[SampledToken], bool]]) -> None:
    for guest, tokens, ended in deliveries:
        guest.deliver(tokens, ended)
