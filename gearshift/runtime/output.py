"""What a run prints is no part of its work: where it cannot be written, the run goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast


def silence(stream: IO[str]) -> None:
    """Whatever is still written to it, at the interpreter's end too, goes nowhere."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def steady_output() -> Iterator[None]:
    """Inside, a closed or full standard output or error is told once on the other, and raises
    nothing.
    """
    before = sys.stdout, sys.stderr
    steady = _Steady(before[0], before[1], "output"), _Steady(before[1], before[0], "error")
    sys.stdout, sys.stderr = cast(tuple[Any, Any], steady)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Steady:
    """A stream that takes what it is given, and drops it once the file beneath refuses."""

    def __init__(self, stream: IO[str], other: IO[str], name: str) -> None:
        self._stream, self._other, self._name = stream, other, name
        self._told = False

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._refused(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._refused(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _refused(self, error: Exception) -> None:
        silence(self._stream)
        reason = getattr(error, "strerror", None) or str(error)
        if self._told:
            return
        self._told = True
        told = f"gearshift: standard {self._name} is lost ({reason}); the run goes on.\n"
        with suppress(OSError, ValueError):
            self._other.write(told)
            self._other.flush()
