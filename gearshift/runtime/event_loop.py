"""A coroutine run to its end from code that is not asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns. An event loop of its own runs it, in this thread. A loop that
    runs here already, as in a notebook, stands still meanwhile.

    Signal handlers stay as they are. Before an error or an interrupt leaves this function, every
    task is cancelled and comes to its end.
    """
    with _without_running_loop():
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(coroutine)
        finally:
            try:
                _cancel_tasks(loop)
                loop.run_until_complete(loop.shutdown_asyncgens())
            finally:
                loop.close()


def _cancel_tasks(loop: asyncio.AbstractEventLoop) -> None:
    loop.set_exception_handler(lambda *_: None)  # the error that ended the coroutine is raised
    cancelled: set[asyncio.Task[Any]] = set()  # a second time would break off what cleans up
    while tasks := asyncio.all_tasks(loop):
        for task in tasks - cancelled:
            task.cancel()
        cancelled |= tasks
        with suppress(BaseException):  # an interrupt that reached a task is raised once more here
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


@contextmanager
def _without_running_loop() -> Iterator[None]:
    """Inside, this thread has no running loop and no current task; afterwards it has them again."""
    outer = asyncio._get_running_loop()
    if outer is None:
        yield
        return
    task = asyncio.current_task()
    if task is not None:
        asyncio._leave_task(outer, task)
    asyncio._set_running_loop(None)
    try:
        yield
    finally:
        asyncio._set_running_loop(outer)
        if task is not None:
            asyncio._enter_task(outer, task)
