"""Threads for other people's code: environments and reward functions that may wait, or hang.

Daemon threads, which the standard executors do not offer: one that hangs must not hold up the
process's end.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

from gearshift.errors import CapacityError

MOST_HUNG = 256
"""Calls that may hang at a time; a thread cannot be ended from outside."""
_PATIENCE = 0.05


class GivenUp(BaseException):
    """Raised inside a call that was given up, wherever its Python code is by then."""


class Workers:
    """`count` threads that run what is submitted, in order, and more while those wait."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._doing: dict[Future[Any], int] = {}
        """The thread in which a call runs."""
        self._hung: set[Future[Any]] = set()
        self._count = self._threads = count
        self._taken = time.monotonic()
        for _ in range(count):
            self._start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` when a thread is free; the future holds what it returns or raises."""
        future: Future[Any] = Future()
        if self._tasks.empty():
            self._taken = time.monotonic()
        self._tasks.put((future, task))
        return future

    def hurry(self) -> None:
        """One more thread, if nothing that stands in line has been taken for a while: the calls
        that run may all be waiting for something. It ends when the line does.
        """
        with self._lock:
            if self._tasks.empty() or time.monotonic() - self._taken < _PATIENCE:
                return
            self._taken = time.monotonic()
            self._threads += 1
        self._start()

    def give_up(self, future: Future[Any]) -> None:
        """Another thread takes the place of the one in which this call hangs. That one ends when
        the call does; a call that runs Python code is made to, one that waits is not.

        Raises `CapacityError` if too many hang.
        """
        with self._lock:
            thread = self._doing.pop(future, None)
            if thread is None:  # it ended just now, or never began
                return
            self._hung.add(future)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(thread), ctypes.py_object(GivenUp)
            )
            if len(self._hung) > MOST_HUNG:
                raise CapacityError(
                    f"{len(self._hung)} calls of environments or rewards hang; give them "
                    "timeouts of their own, so that they end."
                )
        self._start()

    def _start(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            future, task = taken
            if not future.set_running_or_notify_cancel():
                continue
            try:
                if not self._run(future, task):
                    return
            except GivenUp:
                return
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
            self._doing[future] = threading.get_ident()
        error: BaseException | None = None
        try:
            result = task()
        except BaseException as raised:  # whatever it is belongs to who waits for the future
            error = raised
        with self._lock:
            if self._doing.pop(future, None) is None:
                return False
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        return True

    def _needed(self) -> bool:
        """Whether the thread stays when nothing stands in line."""
        with self._lock:
            return self._threads <= self._count
