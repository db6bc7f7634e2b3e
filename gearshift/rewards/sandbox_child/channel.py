"""The messages between the two sandboxes: each is one line of JSON with plain data. An object that
is not plain data stays in its process, and its number crosses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

MAX_LINE = 16 << 20
"""The longest line that is read, in bytes."""
DEEP_RECURSION = 10_000
"""The recursion limit while data is written or read."""
_EXACT = 1 << 53
_SEQUENCES = ("list", "tuple", "set", "frozenset")
_DICTS = ("dict", "Counter", "OrderedDict", "defaultdict")
_VIEWS = ("dict_keys", "dict_values", "dict_items")
_PLAIN = frozenset({*_SEQUENCES, *_DICTS, *_VIEWS, "int", "bytes", "bytearray", "complex", "range"})
_TIMES = frozenset({"date", "datetime", "time", "timedelta"})


class Channel:
    """One end of the two pipes. While it waits for an answer, the other end may send requests of
    its own.
    """

    def __init__(
        self,
        gets: BinaryIO,
        sends: BinaryIO,
        serve: Callable[[Any], Any],
        too_long: Callable[[], Any],
        nan: bool = True,
    ) -> None:
        """`serve` answers a request; `too_long` gives the answer to send instead of one that is too
        long.
        """
        self._nan = nan
        self._gets, self._sends, self._serve, self._too_long = gets, sends, serve, too_long

    def send(self, message: Any) -> None:
        """Send a message. Raises `ValueError` or `RecursionError` if its line is too long or too
        deeply nested.
        """
        with DeepRecursion():
            line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"a line of {len(line)} bytes is too long")
        self._sends.write(line)
        self._sends.flush()

    def read(self) -> Any:
        """Read a message. Raises `EOFError` when the other end is closed; `ValueError` for a line
        that is not JSON or contains a NaN that is not allowed.
        """
        line = self._gets.readline(MAX_LINE + 1)
        if not line.endswith(b"\n"):
            raise EOFError
        with DeepRecursion():
            return json.loads(line, parse_constant=self._constant)

    def wait(self) -> Any:
        """The answer to the last message. Requests that arrive before it are answered first."""
        while True:
            message = self.read()
            if message[0] != "ask":
                return message
            self.answer(message[1])

    def answer(self, request: Any) -> None:
        """Serve one request and send the answer."""
        answer = self._serve(request)
        try:
            self.send(answer)
        except (ValueError, RecursionError):
            self.send(self._too_long())

    def _constant(self, name: str) -> float:
        if name == "NaN" and not self._nan:
            raise ValueError(name)
        return float(name)


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """Plain data as JSON: `[kind, content...]`, except that None, booleans, texts and small numbers
    stay as they are. `other` encodes a value whose type is not exactly a plain one.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float) or (kind is int and abs(value) < _EXACT):
        return value
    if value is ...:
        return ["ellipsis"]
    name = kind.__name__
    if kind.__module__ == "builtins" and name in _PLAIN:
        return [name, *_content(name, value, other)]
    if kind.__module__ == "collections" and name in _DICTS:
        return [name, *_content("dict", value, other)]
    if kind.__module__ == "collections" and name == "deque":
        return [name, [encode(v, other) for v in value], value.maxlen]
    if (kind.__module__, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return [name, str(value)]
    if kind.__module__ == "datetime" and name in _TIMES:
        parts = [value.days, value.seconds, value.microseconds] if name == "timedelta" else []
        return [name, *(parts or [value.isoformat()])]
    return other(value)


def _content(name: str, value: Any, other: Callable[[Any], Any]) -> list[Any]:
    if name == "int":
        return [hex(value)]  # Python limits the digits of a decimal text
    if name in ("bytes", "bytearray"):
        return [value.hex()]
    if name == "complex":
        return [value.real, value.imag]
    if name == "range":
        return [encode(n, other) for n in (value.start, value.stop, value.step)]
    if name == "dict":
        return [[[encode(k, other), encode(v, other)] for k, v in value.items()]]
    return [[encode(v, other) for v in value]]


def decode(value: Any, other: Callable[[str, list[Any]], Any]) -> Any:
    """The inverse of `encode`; `other` decodes the kinds that it does not know. For anything that
    `encode` did not write, it may raise any error.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError(value)
        return value
    kind, *rest = value
    if kind == "ellipsis":
        return ...
    content: Any = rest[0] if rest else None
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        data = bytes.fromhex(content)
        return data if kind == "bytes" else bytearray(data)
    if kind in _SEQUENCES:
        make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
        return make([decode(v, other) for v in content])
    if kind == "dict":
        return {decode(k, other): decode(v, other) for k, v in content}
    if kind == "complex":
        return complex(*rest)
    if kind == "range":
        return range(*(decode(n, other) for n in rest))
    if kind in _VIEWS:
        return _view(kind, [decode(v, other) for v in content])
    if kind in (*_DICTS, "deque"):
        import collections

        if kind == "deque":
            return collections.deque((decode(v, other) for v in content), rest[1])
        pairs = {decode(k, other): decode(v, other) for k, v in content}
        if kind == "defaultdict":
            return collections.defaultdict(None, pairs)
        return getattr(collections, kind)(pairs)
    return _library(kind, rest) if kind in (*_TIMES, "Decimal", "Fraction") else other(kind, rest)


def _view(kind: str, items: list[Any]) -> Any:
    if kind == "dict_keys":
        return dict.fromkeys(items).keys()
    return dict(items).items() if kind == "dict_items" else dict(enumerate(items)).values()


def _library(kind: str, rest: list[Any]) -> Any:
    if kind in _TIMES:
        import datetime

        make = getattr(datetime, kind)
        return make(*rest) if kind == "timedelta" else make.fromisoformat(*rest)
    import decimal
    import fractions

    return (decimal.Decimal if kind == "Decimal" else fractions.Fraction)(*rest)


class DeepRecursion:
    """A context with a recursion limit that is high enough for nested data."""

    def __enter__(self) -> None:
        self._before = sys.getrecursionlimit()
        sys.setrecursionlimit(max(DEEP_RECURSION, self._before))

    def __exit__(self, *_: object) -> None:
        sys.setrecursionlimit(self._before)
