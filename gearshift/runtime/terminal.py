"""Text of models, servers, files and users, made safe for a terminal or a log; and output that may
be lost.

Every such text passes through here before it is printed or kept; no other file knows which
characters are dangerous.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

# Control characters except newline and tab, line separators, marks that change the direction of the
# text after them, and halves of surrogate pairs, which UTF-8 cannot write.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)


def printable(text: str, most: int | None = None) -> str:
    r"""The text with its control characters written as `\x1b`, cut to `most` characters.

    Newlines and tabs stay. Each character is judged alone, so a stream may be passed in pieces.
    """
    if most is not None and len(text) > most:
        text = text[:most]  # cut first: the rest of the work takes long for 100 MB
        return _UNSAFE.sub(_escaped, text)[: max(0, most - 3)] + "..."
    text = _UNSAFE.sub(_escaped, text)
    return text if most is None or len(text) <= most else text[: max(0, most - 3)] + "..."


def one_line(text: str, most: int = 300) -> str:
    """The same in one line, for errors: white space becomes single spaces."""
    return printable(" ".join(text[: 4 * most + 100].split()), most)


def counted(count: int, noun: str) -> str:
    """The number with its noun: `1 row`, `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def echo(text: str, end: str = "\n", file: IO[str] | None = None) -> None:
    """Print the text at once, made printable; to standard output if no file is given."""
    if not _quiet:
        print(printable(text), end=end, file=file or sys.stdout, flush=True)


@contextmanager
def quiet(silent: bool = True) -> Iterator[None]:
    """Inside, `echo` prints nothing and no progress is shown, if `silent`."""
    global _quiet
    before, _quiet = _quiet, _quiet or silent
    try:
        yield
    finally:
        _quiet = before


def is_quiet() -> bool:
    """Whether a `quiet` context is open."""
    return _quiet


_quiet = False


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def silence(stream: IO[str]) -> None:
    """Discard everything that is still written to this stream, at the interpreter's exit too."""
    with suppress(AttributeError, OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def tolerate_lost_output() -> Iterator[None]:
    """Inside, a standard output or error that is closed or full raises nothing; it is reported once
    on the other stream, and the run goes on.
    """
    before = sys.stdout, sys.stderr
    steady = _Steady(before[0], before[1], "output"), _Steady(before[1], before[0], "error")
    sys.stdout, sys.stderr = cast(tuple[Any, Any], steady)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Steady:
    """A stream that accepts all text, and drops it once the file beneath refuses."""

    def __init__(self, stream: IO[str], other: IO[str], name: str) -> None:
        self._stream, self._other, self._name = stream, other, name
        self._reported = False

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
        if self._reported:
            return
        self._reported = True
        message = f"gearshift: standard {self._name} is lost ({reason}); the run goes on.\n"
        with suppress(OSError, ValueError):
            self._other.write(message)
            self._other.flush()
