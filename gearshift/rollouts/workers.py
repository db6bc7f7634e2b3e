"""Threads for other people's code: environments and reward functions that may wait, or hang.

Daemon threads, which the standard executors do not offer: one that hangs must not hold up the
process's end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Workers:
    """`count` threads that run what is submitted, in order."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """One more thread, in place of one that hangs."""
        threading.Thread(target=_work, args=(self._tasks,), daemon=True).start()

    def submit(self, task: Callable[[], Any]) -> Future[Any]:
        """Run `task` when a thread is free; the future holds what it returns or raises."""
        future: Future[Any] = Future()
        self._tasks.put((future, task))
        return future


def _work(tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]]) -> None:
    while True:
        future, task = tasks.get()
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(task())
        except BaseException as error:  # whatever it is belongs to who waits for the future
            future.set_exception(error)
