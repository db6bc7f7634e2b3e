"""Threads that run other people's code: environments and reward functions, which may wait or hang.

They are daemon threads, which the standard executors do not offer: a thread that hangs must not
keep the process alive.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from gearshift.errors import CapacityError

T = TypeVar("T")
MAX_HUNG_CALLS = 2048
"""How many calls may hang at the same time: a thread cannot be ended from outside, and each one
keeps some memory.
"""
_PATIENCE = 0.05


@contextmanager
def exit_in_forks() -> Iterator[None]:
    """End a copy of this process that the code inside forks and does not end itself: it would go on
    as a second caller, with the tasks and connections of the first.
    """
    caller = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != caller:
            os._exit(0)


class CallAbandoned(BaseException):
    """Raised inside a call that was abandoned, wherever its Python code is at that moment."""


def run_with_timeout(seconds: float | None, task: Callable[[], T]) -> T:
    """Run `task` in a thread of its own and return its result or raise its error. After `seconds`
    (None: never) this raises `TimeoutError`, and the task ends at the next Python code that it
    runs.
    """
    future: Future[T] = Future()

    def work() -> None:
        with suppress(CallAbandoned):
            try:
                with exit_in_forks():
                    result = task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        return future.result(seconds)
    except BaseException:  # the time is over, or the waiting thread itself was stopped
        if not future.done() and thread.ident is not None:
            _stop(thread.ident)
        raise


def _stop(thread: int) -> None:
    """Raise `CallAbandoned` in a thread, as soon as it runs Python code."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(CallAbandoned)
    )


class WorkerThreads:
    """`count` threads that run submitted calls in order; more are added while those wait.

    The calls are other people's code. If a call changes the process's working directory, it is
    changed back.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        """None ends the thread that takes it."""
        self._lock = threading.Lock()
        self._doing: dict[Future[Any], tuple[int, float]] = {}
        """For each running call: its thread, and when it began."""
        self._hung: set[Future[Any]] = set()
        self._count = self._threads = count
        self._taken = time.monotonic()
        self._folder = _folder()
        for _ in range(count):
            self._start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` when a thread is free; the future holds its result or its error."""
        future: Future[Any] = Future()
        if self._tasks.empty():
            self._taken = time.monotonic()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End the threads and cancel the calls in the queue. A thread whose call hangs ends when
        the call does.
        """
        while not self._tasks.empty():
            with suppress(Empty):
                if taken := self._tasks.get_nowait():
                    taken[0].cancel()
        for future in list(self._doing):
            self.abandon(future, replace=False)
        for _ in range(self._threads):
            self._tasks.put(None)

    def seconds(self, future: Future[Any]) -> float:
        """How long this call has been running; 0 before it begins and after it has ended."""
        _, since = self._doing.get(future, (0, time.monotonic()))
        return time.monotonic() - since

    def maybe_add_thread(self) -> None:
        """Add a thread, if no queued call has begun for a while: the running calls may all be
        waiting for something. The thread ends when the queue is empty.
        """
        with self._lock:
            if self._tasks.empty() or time.monotonic() - self._taken < _PATIENCE:
                return
            self._taken = time.monotonic()
            self._threads += 1
        self._start()

    def abandon(self, future: Future[Any], replace: bool = True) -> None:
        """Give up a call that hangs, and start another thread in place of its thread (unless
        `replace` is false). The old thread ends when the call does: a call that runs Python code is
        interrupted, a call that waits in other code is not.

        Raises `CapacityError` if too many calls hang.
        """
        with self._lock:
            thread, _ = self._doing.pop(future, (None, 0.0))
            if thread is None:  # it has just ended, or never began
                return
            self._hung.add(future)
            _stop(thread)
            if len(self._hung) > MAX_HUNG_CALLS:
                raise CapacityError(
                    f"{len(self._hung)} calls of environments or rewards hang in threads, which "
                    "cannot be ended; let them run in processes (environment.processes, or "
                    "`processes` of the reward), and the same command goes on."
                )
        self._come_back()
        if replace:
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        # a separate function, so that an idle thread keeps nothing of its last call
        while self._do_next():
            pass

    def _do_next(self) -> bool:
        """Run the next call of the queue; returns whether the thread goes on."""
        taken = self._take()
        if taken is None:
            return False
        future, task = taken
        if not future.set_running_or_notify_cancel():
            return True
        try:
            return self._run(future, task)
        except CallAbandoned:
            return False
        finally:
            self._hung.discard(future)

    def _take(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """The next call of the queue; None where the queue is empty and this thread is not
        needed.
        """
        try:
            return self._tasks.get(timeout=None if self._needed() else 0.0)
        except Empty:
            with self._lock:
                self._threads -= 1
            return None

    def _run(self, future: Future[Any], task: Callable[[], Any]) -> bool:
        """Run a call; returns False if it was abandoned meanwhile, and so its thread must end."""
        with self._lock:
            self._taken = time.monotonic()
            self._doing[future] = threading.get_ident(), self._taken
        error: BaseException | None = None
        try:
            with exit_in_forks():
                result = task()
        # whatever it is, the caller who waits for the future gets it
        except BaseException as raised:
            error = raised
        self._come_back()
        with self._lock:
            if self._doing.pop(future, None) is None:
                return False
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        return True

    def _come_back(self) -> None:
        """Return to the run's working directory, because its paths may be relative."""
        if self._folder and _folder() != self._folder:
            with suppress(OSError):  # it was deleted
                os.chdir(self._folder)

    def _needed(self) -> bool:
        """Whether the thread stays when the queue is empty."""
        with self._lock:
            return self._threads <= self._count


def _folder() -> str | None:
    """The current working directory, if it still exists."""
    try:
        return os.getcwd()
    except OSError:
        return None


def end_with_parent() -> None:
    """Make this process, which runs other people's code, end when its parent ends; where memory is
    short, the system kills it before its parent. Only Linux can do this.
    """
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
