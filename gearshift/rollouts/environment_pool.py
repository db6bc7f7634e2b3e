"""Makes environments when they are needed, uses them again, and calls them in threads, so that one
that waits does not delay the others. This file knows no policy and no tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from gearshift.environments.base import TextEnvironment
from gearshift.environments.worker_processes import (
    EnvironmentProcesses,
    ProcessEnvironment,
    ProcessError,
)
from gearshift.errors import CapacityError
from gearshift.runtime.user_functions import describe_error
from gearshift.runtime.worker_threads import WorkerThreads, run_with_timeout

T = TypeVar("T")
POLL_SECONDS = 0.02
"""Seconds between two checks of the calls that run."""
_CLOSING_SECONDS = 10.0
"""The seconds that environments have to close; after that, the pool no longer waits for them."""


class EpisodeError(Exception):
    """The error that ends one episode, which is left out. The message is the reason, without a full
    stop.
    """


class EnvironmentPool:
    """Makes environments and calls them. Each is called from one thread at a time, but not always
    from the same.
    """

    def __init__(
        self, make: Callable[[], TextEnvironment], workers: int, timeout: float | None
    ) -> None:
        """`workers` calls run at a time, and more where those only wait. A call that takes more
        than `timeout` seconds is abandoned; None: never.
        """
        self._make, self._timeout = make, timeout
        self._workers = WorkerThreads(workers)
        self._idle: list[TextEnvironment] = []
        self._open: list[TextEnvironment] = []
        """All environments that were made and not discarded."""
        self._calls: dict[Future[Any], _Call] = {}
        self._made_one = False

    def take(self) -> TextEnvironment:
        """An idle environment, or a new one. If the very first one cannot be made, its error is
        raised; if a later one cannot be made, only its episode fails.
        """
        if self._idle:
            return self._idle.pop()
        try:
            made = self.make()
        except (Exception, SystemExit) as error:
            if not self._made_one:
                raise
            return _Unmade(error)
        self._made_one = True
        return made

    def make(self) -> TextEnvironment:
        """A new environment."""
        made = self._make()
        self._open.append(made)
        return made

    def give_back(self, environments: Iterable[TextEnvironment]) -> None:
        """These have ended their episodes well; `take` may give them again."""
        self._idle += environments

    def discard(self, environment: TextEnvironment) -> None:
        """This one failed and may be broken. Its process, if it has one, ends."""
        if isinstance(environment, ProcessEnvironment):
            environment.close()
            self._open = [other for other in self._open if other is not environment]

    async def call(self, environment: TextEnvironment, function: Callable[[], T]) -> T:
        """Run the function, which uses the environment, in a thread, and return its result.

        Raises `EpisodeError` if the function raises, `sys.exit` included, or takes too long;
        `CapacityError` if too many calls hang. `watch` must run meanwhile.
        """
        loop = asyncio.get_running_loop()
        call = _Call(environment, function, loop.create_future())
        future = self._workers.submit(call)
        self._calls[future] = call
        future.add_done_callback(lambda _: _call_soon(loop, call.finish))
        try:
            await call.answered
        finally:
            del self._calls[future]
            future.cancel()  # a call that has not begun is not needed any more
        error = future.exception()
        if error is not None:
            raise EpisodeError(_reason(error))
        result: T = future.result()
        return result

    async def watch(self) -> None:
        """Add a thread where all calls seem to wait, and abandon calls that hang; never returns."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            self._workers.maybe_add_thread()
            for future, call in list(self._calls.items()):
                hangs = self._timeout is not None and call.seconds() > self._timeout
                if hangs and not future.done() and not call.answered.done():
                    call.answered.set_exception(self._abandon(future, call.environment))

    def call_and_wait(self, environment: TextEnvironment, function: Callable[[], T]) -> Future[T]:
        """The function's future, which is done. A thread runs the function; the caller waits.

        Raises `EpisodeError` if it takes too long, `CapacityError` if too many calls hang.
        """
        future: Future[T] = self._workers.submit(function)
        wait([future], timeout=self._timeout)
        if not future.done():
            raise self._abandon(future, environment)
        return future

    def close(self) -> None:
        """Close the environments, and end the threads and processes in which they answered."""
        self._idle.clear()
        opened, self._open = self._open, []
        with suppress(Exception):
            run_with_timeout(_CLOSING_SECONDS, partial(_close_all, opened))
        self._workers.close()
        if isinstance(self._make, EnvironmentProcesses):
            self._make.close()

    def _abandon(self, future: Future[Any], environment: TextEnvironment) -> Exception:
        """Stop waiting for the call's thread, and give its caller the reason."""
        try:
            self._workers.abandon(future)
        except CapacityError as error:
            return error
        finally:
            if isinstance(environment, ProcessEnvironment):
                environment.kill()
        return EpisodeError(
            describe_error(TimeoutError(f"it took longer than {self._timeout:g} s"))
        )


@dataclass(eq=False, slots=True)
class _Call:
    """A function that a thread runs for a coroutine."""

    environment: TextEnvironment
    function: Callable[[], Any]
    answered: asyncio.Future[None]
    began: float | None = None

    def __call__(self) -> Any:
        if isinstance(self.environment, ProcessEnvironment):
            self.environment.ready()  # the start of its process does not count
        self.began = time.monotonic()
        return self.function()

    def seconds(self) -> float:
        """How long the function has been running."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def finish(self) -> None:
        if not self.answered.done():
            self.answered.set_result(None)


class _Unmade(TextEnvironment):
    """Stands for an environment that could not be made, and fails at its first use."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        raise self._error

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        raise self._error


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop was closed: its callers are gone
        loop.call_soon_threadsafe(function)


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, ProcessError) else describe_error(error)


def _close_all(environments: Sequence[TextEnvironment]) -> None:
    for environment in environments:
        with suppress(Exception):
            environment.close()
