"""Threads for other people's code: environments and reward functions that may wait, or hang.

Daemon threads, which the standard executors do not offer: one that hangs must not hold up the
process's end.
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
"""Calls that may hang at a time: a thread cannot be ended from outside, and each keeps some
memory."""
_PATIENCE = 0.05


@contextmanager
def exit_in_forks() -> Iterator[None]:
    """A process that other people's code forks and does not end, ends here: it would go on as a
    second caller, with the first one's tasks and connections.
    """
    caller = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != caller:
            os._exit(0)


class CallAbandoned(BaseException):
    """Raised inside a call that was given up, wherever its Python code is by then."""


def run_with_timeout(seconds: float | None, task: Callable[[], T]) -> T:
    """What `task` returns or raises, in a thread of its own. Raises `TimeoutError` after so many
    seconds (None: never), and then makes the task end at the next Python code that it runs.
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
    except BaseException:  # the time is over; or who waits was told to stop
        if not future.done() and thread.ident is not None:
            _stop(thread.ident)
        raise


def _stop(thread: int) -> None:
    """Raise `CallAbandoned` in a thread, as soon as it runs Python code."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(CallAbandoned)
    )


class WorkerThreads:
    """`count` threads that run what is submitted, in order, and more while those wait.

    What runs there is other people's code. A call that leaves the process in another folder does
    not take the run along.
    """

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        """None ends the thread that takes it."""
        self._lock = threading.Lock()
        self._doing: dict[Future[Any], tuple[int, float]] = {}
        """The thread in which a call runs, and since when."""
        self._hung: set[Future[Any]] = set()
        self._count = self._threads = count
        self._taken = time.monotonic()
        self._folder = _folder()
        for _ in range(count):
            self._start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` when a thread is free; the future holds what it returns or raises."""
        future: Future[Any] = Future()
        if self._tasks.empty():
            self._taken = time.monotonic()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """End the threads; what stands in line is cancelled. One whose call hangs ends when the
        call does.
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
        """How long this call has been running; 0 before it begins and after it ended."""
        _, since = self._doing.get(future, (0, time.monotonic()))
        return time.monotonic() - since

    def maybe_add_thread(self) -> None:
        """One more thread, if nothing that stands in line has been taken for a while: the calls
        that run may all be waiting for something. It ends when the line does.
        """
        with self._lock:
            if self._tasks.empty() or time.monotonic() - self._taken < _PATIENCE:
                return
            self._taken = time.monotonic()
            self._threads += 1
        self._start()

    def abandon(self, future: Future[Any], replace: bool = True) -> None:
        """Another thread takes the place of the one in which this call hangs (unless `replace` is
        false). That one ends when the call does; a call that runs Python code is made to, one that
        waits is not.

        Raises `CapacityError` if too many hang.
        """
        with self._lock:
            thread, _ = self._doing.pop(future, (None, 0.0))
            if thread is None:  # it ended just now, or never began
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
        while self._do_next():  # a thread that waits keeps nothing of what it did
            pass

    def _do_next(self) -> bool:
        """Run what is next in line; whether the thread goes on."""
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
        """What is next in line; None where the thread is one too many and nothing is."""
        try:
            return self._tasks.get(timeout=None if self._needed() else 0.0)
        except Empty:
            with self._lock:
                self._threads -= 1
            return None

    def _run(self, future: Future[Any], task: Callable[[], Any]) -> bool:
        """Whether the call came to its end before it was given up, and so the thread goes on."""
        with self._lock:
            self._taken = time.monotonic()
            self._doing[future] = threading.get_ident(), self._taken
        error: BaseException | None = None
        try:
            with exit_in_forks():
                result = task()
        except BaseException as raised:  # whatever it is belongs to who waits for the future
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
        """To the folder in which the run was, for its paths may begin there."""
        if self._folder and _folder() != self._folder:
            with suppress(OSError):  # it was deleted
                os.chdir(self._folder)

    def _needed(self) -> bool:
        """Whether the thread stays when nothing stands in line."""
        with self._lock:
            return self._threads <= self._count


def _folder() -> str | None:
    """The one in which this process is, if there still is one."""
    try:
        return os.getcwd()
    except OSError:
        return None


def end_with_parent() -> None:
    """In a process for other people's code: it does not outlive its parent, and where memory is
    short it is killed before its parent is. Linux alone can promise that.
    """
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("500")
