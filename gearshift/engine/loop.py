"""The only code that steps the engine: every request for completions goes to this loop.

    completion = await loop.generate(prompt, SamplingParams(), request_id=7)
    async for token in loop.stream(prompt, SamplingParams(), request_id=8): ...

All running requests advance together in one step, by one token each. Synchronous calls step in
their own thread until they have their result. Awaiting calls share a task of their event loop: it
makes a step, lets the other tasks continue, and ends when nothing is awaited.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gearshift.engine.decoder import Decoder
from gearshift.engine.scheduler import Group, Scheduler
from gearshift.engine.sequence import Sequence
from gearshift.engine.stepped_engine import SteppedEngine
from gearshift.errors import GearshiftError
from gearshift.kernels.specs import BLOCK
from gearshift.types import Completion, SamplingParams


class Service(Protocol):
    """Requests of other threads; see `engine/service.py`."""

    def take(self) -> list[Group]:
        """The requests that have arrived since the last call."""

    def publish(self, running: int) -> None:
        """Send on what was sampled; `running` of the requests have a row."""


class EngineLoop:
    """Runs an engine's requests. It is a `GenerationBackend`."""

    exact = True

    def __init__(self, engine: SteppedEngine) -> None:
        self._engine = engine
        self._scheduler: Scheduler | None = None
        self._decoder: Decoder | None = None
        self._arrivals: list[Group] = []
        """New groups, which the next step gives to the scheduler."""
        self._dropped: deque[Sequence] = deque()
        """Requests whose streams were thrown away; any thread may do that, at any time."""
        self._waiters: dict[asyncio.Future[None], tuple[Sequence, int | None]] = {}
        """What each future awaits: more tokens of a sequence than this number, or (None) its end.
        """
        self._driver: asyncio.Task[None] | None = None
        self._stepping = False
        self._service: Service | None = None
        self._paused: list[Group] = []
        """The service's requests that were running when the weights changed."""

    def serve(self, service: Service | None) -> None:
        """Run the requests of this service too, from the next step on; None: of no service. They
        change nothing for other requests, and pause where the weights change.
        """
        if service and self._service:
            raise GearshiftError("This engine has a service already; close that one first.")
        self._service = service

    async def generate(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        """One completion; see `GenerationBackend`. Requests that arrive in one tick of the event
        loop with the same prompt and id are one group.
        """
        sequence = self._enqueue(token_ids, params, request_id, sample)
        try:
            while not sequence.has_ended():
                await self._progress(sequence, None)
        finally:
            self.drop(sequence)  # if this call is cancelled
        return sequence.completion()

    def stream(
        self,
        token_ids: Iterable[int],
        params: SamplingParams | None = None,
        request_id: int = 0,
        sample: int = 0,
    ) -> Stream:
        """The tokens of one completion as they are sampled, for `for` or for `async for`."""
        params = params or SamplingParams()
        return Stream(self, self._enqueue(token_ids, params, request_id, sample))

    def complete(
        self, requests: Iterable[tuple[Iterable[int], SamplingParams, int]]
    ) -> list[list[Completion]]:
        """`params.n` completions of each (prompt, params, request id). Other requests continue
        meanwhile.
        """
        self._engine.check_generating()
        groups = [
            self._engine.limits.group(token_ids, params, request_id, f"Prompt {place}")
            for place, (token_ids, params, request_id) in enumerate(requests)
        ]
        if self.idle:
            self._engine.prepare_generation()
        self._arrivals += groups
        try:
            while not all([s.has_ended() for group in groups for s in group]):
                self.step()
        except BaseException:  # also after an interrupt: these requests must not continue
            for sequence in (s for group in groups for s in group):
                self.abort(sequence)
            raise
        return [[s.completion() for s in group] for group in groups]

    async def update_weights(self, weights: Path | Mapping[str, Tensor], version: int) -> None:
        """See `Engine.update_weights`."""
        self._engine.update_weights(weights, version)

    def generating(self) -> AbstractContextManager[Any]:
        """See `Engine.generating`."""
        return self._engine.generating()

    def stats(self) -> dict[str, float]:
        """The figures of generation since the last call, by name."""
        return self._engine.named_stats()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs, but for the service's requests."""
        self._abort_dropped()
        scheduler = self._scheduler
        return not self._arrivals and (
            scheduler is None or scheduler.idle or all(s.served for s in scheduler.sequences)
        )

    @property
    def has_work(self) -> bool:
        """Whether a step has something to do, also for the service."""
        runs = self._scheduler is not None and not self._scheduler.idle
        return runs or bool(self._arrivals or self._paused or self._dropped)

    def pause(self) -> None:
        """Take the service's requests off the cache; the next step computes them again and goes on
        with them.
        """
        if self._scheduler is not None:
            self._paused += self._scheduler.withdraw_served()
            self._publish()

    def step(self) -> None:
        """Sample one token for every running request. Only the engine's own parts use it. An error
        or an interrupt in the middle ends every request; the next step starts with an empty
        scheduler.
        """
        self._engine.check_generating()
        if self._stepping:
            raise GearshiftError("A step called itself, by way of the tokenizer or a hook.")
        self._stepping = True
        try:
            self._engine.check_weights()
            self._admit()
            self._compute()
        except BaseException as error:
            self._end_all(error)
            raise
        finally:
            self._stepping = False
        self._wake()

    def abort(self, sequence: Sequence) -> None:
        """End a request now, if it has not ended. Its part of the cache becomes free."""
        if sequence.finish_reason is None:
            self._engine.check_owner()
            self._abort(sequence)
            self._wake()

    def drop(self, sequence: Sequence) -> None:
        """End a request soon, before the next step or the next change of the weights. Any thread
        may call this.
        """
        if sequence.finish_reason is None:
            self._dropped.append(sequence)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._scheduler.cache.bytes() if self._scheduler else 0

    @property
    def position_bytes(self) -> float:
        """Bytes of one position of the cache; not a number where there is none."""
        if self._scheduler is None:
            return float("nan")
        cache = self._scheduler.cache
        return cache.bytes() / max(1, cache.blocks * BLOCK)

    def reset_prefix_cache(self) -> None:
        """Discard what was computed, because the weights have changed."""
        if self._scheduler is not None:
            self._scheduler.cache.reset_prefix_cache()

    def forget_captures(self) -> None:
        """Drop the captured decode steps, because the weights have other addresses."""
        if self._decoder is not None:
            self._decoder.forget_captures()

    def release(self) -> None:
        """Free the cache. Raises `GearshiftError` while requests are on their way."""
        self.pause()
        if not self.idle:
            raise GearshiftError("Requests are running; let them end, or abort them.")
        self._scheduler = self._decoder = None

    def _enqueue(
        self, token_ids: Iterable[int], params: SamplingParams, request_id: int, sample: int
    ) -> Sequence:
        self._engine.check_generating()
        sequence = self._engine.limits.sequence(token_ids, params, request_id, sample)
        if self.idle:
            self._engine.prepare_generation()
        for group in reversed(self._arrivals):
            if group[0].request_id == request_id and group[0].prompt == sequence.prompt:
                group.append(sequence)
                return sequence
        self._arrivals.append([sequence])
        return sequence

    def _admit(self) -> None:
        """Give the new requests to the scheduler."""
        self._abort_dropped()
        if self._service:
            self._arrivals += self._service_arrivals()
        if not self._arrivals:
            return
        if self._scheduler is None:
            self._scheduler, self._decoder = self._engine.new_generation(self._arrivals)
        self._scheduler.add(self._arrivals)
        self._arrivals = []

    def _service_arrivals(self) -> list[Group]:
        assert self._service is not None
        arrived = self._service.take()
        paused, self._paused = self._paused, []
        if arrived and self.idle:
            self._engine.prepare_generation()
        return paused + arrived

    def _compute(self) -> None:
        """Schedule, run, postprocess."""
        began = time.perf_counter()
        plan = self._scheduler.schedule() if self._scheduler else None
        if plan is None or self._scheduler is None or self._decoder is None:
            if self._service:
                return
            raise GearshiftError("No request is running; send one first.")
        sampled = self._decoder.run(plan)
        self._scheduler.postprocess(plan, sampled, self._engine.weights_version)
        self._scheduler.count_seconds(plan, time.perf_counter() - began)

    def _abort(self, sequence: Sequence) -> None:
        if self._scheduler is not None:
            self._scheduler.abort(sequence)
        for group in self._arrivals + self._paused:
            if sequence in group:
                group.remove(sequence)
                sequence.finish_reason = "abort"
        self._arrivals = [group for group in self._arrivals if group]
        self._paused = [group for group in self._paused if group]

    def _abort_dropped(self) -> None:
        while self._dropped:
            self._abort(self._dropped.popleft())

    def _end_all(self, error: BaseException) -> None:
        """End all requests after an error in the middle of a step, because what was computed cannot
        be trusted.
        """
        ended = GearshiftError("An earlier error ended this request; send it again.")
        waiting = [s for group in self._arrivals for s in group]
        for sequence in waiting + (self._scheduler.sequences if self._scheduler else []):
            sequence.fail(ended)
        self._scheduler, self._decoder, self._arrivals = None, None, []
        self._publish()
        self._fail_waiters(error if isinstance(error, Exception) else ended)

    async def _progress(self, sequence: Sequence, seen: int | None) -> None:
        """Wait until the sequence has more tokens than `seen` (None: any number), or has ended."""
        loop = asyncio.get_running_loop()
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._drive())
            self._driver.add_done_callback(_retrieve)
        future = loop.create_future()
        self._waiters[future] = sequence, seen
        try:
            await future
        finally:
            self._waiters.pop(future, None)

    async def _drive(self) -> None:
        """Make steps while something is awaited. Between two steps all other ready tasks run, so
        that requests of one tick arrive together.
        """
        while True:
            await asyncio.sleep(0)
            if not self._waiters:
                return
            try:
                self.step()
            except Exception as error:  # the waiting callers get it
                self._fail_waiters(error)

    def _publish(self) -> None:
        if self._service:
            live = self._scheduler.live if self._scheduler else []
            self._service.publish(sum(s.served for s in live))

    def _wake(self) -> None:
        self._publish()
        for future, (sequence, seen) in list(self._waiters.items()):
            more = seen is not None and len(sequence.token_ids) > seen
            if (more or sequence.finish_reason is not None) and not future.done():
                future.set_result(None)

    def _fail_waiters(self, error: Exception) -> None:
        for future in self._waiters:
            if not future.done():
                future.set_exception(error)
        self._waiters.clear()


class Stream:
    """The tokens of one completion as they are sampled; other requests run on meanwhile.

    A stream that is thrown away half-read ends its request.
    """

    def __init__(self, loop: EngineLoop, sequence: Sequence) -> None:
        self._loop, self._sequence, self._read = loop, sequence, 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> int:
        while not self._has_more():
            if self.ended:
                raise StopIteration
            self._loop.step()
        return self._next()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> int:
        while not self._has_more():
            if self.ended:
                raise StopAsyncIteration
            await self._loop._progress(self._sequence, self._read)
        return self._next()

    def __del__(self) -> None:
        self._loop.drop(self._sequence)

    @property
    def ended(self) -> bool:
        """Whether its last token was sampled. Raises the error that ended it, if one did."""
        return self._sequence.has_ended()

    @property
    def completion(self) -> Completion:
        """The completion so far; its `finish_reason` is `abort` until it has ended by itself."""
        return self._sequence.completion()

    def abort(self) -> None:
        """End the request now; its part of the cache becomes free at once."""
        self._loop.abort(self._sequence)

    def _has_more(self) -> bool:
        return self._read < len(self._sequence.token_ids)

    def _next(self) -> int:
        self._read += 1
        return self._sequence.token_ids[self._read - 1]


def _retrieve(task: asyncio.Task[None]) -> None:
    """An interrupt that ended the task has reached its event loop already; it needs no log."""
    if not task.cancelled():
        task.exception()
