"""Records which engine uses a model's weights and cache now: one engine at a time, in one thread,
with its gears in one task.
"""

from __future__ import annotations

import asyncio
import os
import threading
from weakref import WeakKeyDictionary

from torch import nn

from gearshift.errors import GearshiftError

_lock = threading.Lock()


class Owner:
    """A lock that an engine holds in a gear and while it changes. The holder may take it again."""

    def __init__(self) -> None:
        self._holder: tuple[int, int] | None = None
        self._task: asyncio.Task[object] | None = None
        self._depth, self._process = 0, os.getpid()

    def take(self, engine: object) -> None:
        """Take the lock. Raises `GearshiftError` if another thread, task or engine of this model
        has it, or if this process was forked from the model's process.
        """
        if os.getpid() != self._process:
            raise GearshiftError(
                "This engine was made in the process that this one was forked from; make one here."
            )
        holder, task = (threading.get_ident(), id(engine)), _task()
        with _lock:
            if self._holder not in (None, holder):
                self._refuse(holder)
            if self._holder is None:
                self._task = task
            elif self._task not in (None, task) and not self._task.done():
                raise GearshiftError(
                    "Another task of this thread is in a gear of this engine, and tasks leave "
                    "theirs in any order; let it leave first, or enter once around both."
                )
            self._holder = holder
            self._depth += 1

    def check(self, engine: object) -> None:
        """Raise the errors that `take` would raise, without taking the lock."""
        holder = threading.get_ident(), id(engine)
        if self._holder != holder or os.getpid() != self._process:
            self.take(engine)
            self.leave()

    def leave(self) -> None:
        """Release the lock. Call it once for each `take`."""
        with _lock:
            self._depth -= 1
            if not self._depth:
                self._holder = self._task = None

    def _refuse(self, holder: tuple[int, int]) -> None:
        if self._holder and self._holder[0] != holder[0]:
            raise GearshiftError(
                "Another thread uses this engine; let it leave its gear first, or do both in one "
                "thread: `stream` and `engine.loop` run many requests at the same time."
            )
        raise GearshiftError(
            "Another engine of this model is in a gear; leave that first, or give each a model."
        )


def _task() -> asyncio.Task[object] | None:
    """The task that runs in this thread now; None without one."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop
        return None


_owners: WeakKeyDictionary[nn.Module, Owner] = WeakKeyDictionary()


def owner_of(model: nn.Module) -> Owner:
    """The owner of this model; all its engines share it."""
    with _lock:
        return _owners.setdefault(model, Owner())
