"""A digest that distinguishes one version of a caller's function from another. It calls no user
code.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

_PLAIN = (str, bytes, int, float, complex, type(None), PurePath)
_MOST = 1000
"""So many values are read at most: a function may hold a whole data set."""


def function_mark(function: Any) -> str:
    """A digest of the function's source, and of the values that it works with: its defaults, the
    arguments of a `partial`, the variables around it, the attributes of its object, and numbers
    and texts among the globals. So two closures of one source have different marks.
    """
    reader = _Reader(_module(function))
    text = "\n".join(reader.read(function))
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


class _Reader:
    def __init__(self, module: str) -> None:
        """`module` is the caller's; what other modules hold is read by its name only."""
        self.module, self.seen = module, set[int]()

    def read(self, value: Any) -> Iterator[str]:
        if isinstance(value, _PLAIN):
            yield repr(value)
        elif id(value) not in self.seen and len(self.seen) < _MOST:
            self.seen.add(id(value))
            for part in self._parts(value):
                yield from [part] if isinstance(part, str) else self.read(part[0])

    def _parts(self, value: Any) -> Iterator[str | tuple[Any]]:
        """Texts, and further values, each in a tuple."""
        if isinstance(value, Mapping):
            yield from ((each,) for pair in value.items() for each in pair)
        elif isinstance(value, list | tuple):
            yield from ((each,) for each in value)
        elif isinstance(value, set | frozenset):
            yield repr(sorted(map(repr, filter(_is_plain, value))))
        elif isinstance(value, partial):
            yield from ((value.func,), (value.args,), (value.keywords,))
        elif isinstance(value, MethodType):
            yield from ((value.__func__,), (value.__self__,))
        elif _module(value) != self.module:
            yield _name(value)
        elif isinstance(value, FunctionType):
            yield _source(value)
            yield from ((value.__defaults__,), (value.__kwdefaults__,))
            yield from ((each,) for each in self._variables(value))
        elif isinstance(value, type):
            yield _source(value)
        else:
            yield from ((type(value),), (getattr(value, "__dict__", None),))

    def _variables(self, function: FunctionType) -> Iterator[Any]:
        """The variables around a function, and the globals that are plain values or code."""
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # it is not set yet
                continue
        for name in sorted(set(_names(function.__code__)) & function.__globals__.keys()):
            value = function.__globals__[name]
            if _is_plain(value) or isinstance(value, FunctionType | type | partial):
                yield name
                yield value


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _module(value: Any) -> str:
    while isinstance(value, partial | MethodType):
        value = value.func if isinstance(value, partial) else value.__func__
    named = value if isinstance(value, FunctionType | type) else type(value)
    return str(named.__module__)


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # it was typed into an interpreter
        code = getattr(value, "__code__", None)
        return _name(value) if code is None else _of_code(code)


def _of_code(code: CodeType) -> str:
    inner = [_of_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{sys.version_info[:2]} {code.co_code.hex()} {code.co_names} {inner}"
