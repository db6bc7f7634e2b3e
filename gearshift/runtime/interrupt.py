"""Signals that ask a run to stop: the first one stops it at the next safe point, the second one at
once, the third one kills it. This file does not know what a run is.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from gearshift.errors import InterruptedRunError
from gearshift.runtime.terminal import is_quiet

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by a signal; `Interrupt` turns it into an `InterruptedRunError`.

    It is not an `Exception`, so code that ignores errors does not ignore it.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.signal = number
        """The number of the signal."""


class Interrupt:
    """While it is open, a signal ends the code inside: at once, or after a step (`between_steps`).

    An `Interrupt` that is opened inside another one does nothing. Signals belong to the main
    thread, so it also does nothing in other threads. A signal that was ignored before, as SIGHUP is
    under nohup, stays ignored.
    """

    signal: int = 0
    """The number of the first signal that came; 0 if none came."""
    urgent: bool = False
    """Whether a second signal came."""
    where: str = "at once"
    """What the run is doing now, in words that follow `Stopped`."""
    rest: str = "the same command goes on from there"
    """What the user can do after it, in words that end the message."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._patient, self._says, self._held, self._raised = False, "", 0, False

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal != 0

    def __enter__(self) -> Interrupt:
        global _open
        if threading.current_thread() is not threading.main_thread():
            return self
        if _open is not None:
            return _open
        _open, self._process = self, os.getpid()
        for number in SIGNALS:
            # None is a handler that was not set from Python; it could not be restored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._request)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises `InterruptedRunError` if a signal ended the code inside."""
        global _open
        if _open is not self:
            return
        _open = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        if stopped := _comes_of_a_signal(error):  # to this process, or to another rank of the run
            number = self.signal or stopped.signal
            told: Any = InterruptedRunError(f"Stopped {self.where}; {self.rest}.", number)
            told.known_to_all = getattr(error, "known_to_all", False)
            raise told from None

    @contextmanager
    def between_steps(self, says: str = "") -> Iterator[None]:
        """Inside, the first signal only sets `signal` and prints `says`, and a loop checks it
        between its steps; the second signal raises.
        """
        self._patient, self._says = True, says
        try:
            yield
        finally:
            self._patient = False

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Inside, no signal raises an exception, so the code is not cut in the middle."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._patient:
            self.check()

    def stop(self, message: str) -> NoReturn:
        """End the run here, because a signal asked for it."""
        self._raised = True
        raise InterruptedRunError(message, self.signal)

    def check(self) -> None:
        """End the run here, if a signal asked for it and no code has noticed yet."""
        if self.requested and not self._raised and not self._held and self is _open:
            self._raised = True
            raise Stopped(self.signal)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child ends as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        again = self.requested
        if again and number == getattr(signal, "SIGHUP", 0):
            return  # a terminal that closes sends two signals
        self.signal = self.signal or number
        if again:
            self.urgent = True
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
        if self._held or self._raised:
            return
        if self._patient and not again:
            if is_quiet():
                return
            with suppress(AttributeError, OSError, ValueError):  # `print` may be running just now
                os.write(sys.__stderr__.fileno(), self._says.encode())  # type: ignore[union-attr]
            return
        self._raised = True
        raise Stopped(self.signal)

    def _lost(self, lost: Any) -> None:
        """Python drops an exception in a finalizer, after this call. A signal that came in one ends
        the run at the next `check`.
        """
        if isinstance(lost.exc_value, Stopped):
            self._raised = False
        else:
            self._unraisable(lost)


_open: Interrupt | None = None
"""The one that is open in this process."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what runs inside, for the message of a signal: `doing("while saving sft")`."""
    if _open is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt, before = _open, _open.where
    interrupt.where = what
    yield
    interrupt.where = before  # not after an exception: its message still needs `where`


@contextmanager
def shielded() -> Iterator[None]:
    """Open `Interrupt.shielded` of the open interrupt, if there is one."""
    if _open is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _open.shielded():
        yield
    if _open is not None and _open.urgent:  # not held for the checkpoint of a step
        _open.check()


def _comes_of_a_signal(error: BaseException | None) -> Stopped | None:
    """The `Stopped` that an error is, or that was handled when it was raised; None without one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
