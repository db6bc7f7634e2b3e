"""Proxies, which the tests get in place of the program's objects. A proxy has the object's number,
and sends operations to the object.

A proxy never equals plain data, even if the object's `__eq__` is True, because the expected value
must not reach the program. An object whose class derives from a plain type is compared here, by its
data.
"""

from __future__ import annotations

import operator
import types
from functools import cache
from typing import Any

from gearshift.rewards.sandbox_child.name_analysis import PLAIN_NAMES
from gearshift.rewards.sandbox_child.program import BASES, OPERATORS

_OF_ANY = frozenset(
    [
        "__name__",
        "__qualname__",
        "__doc__",
        "__module__",
        "__dict__",
        "__annotations__",
        "__defaults__",
        "__wrapped__",
        "__members__",
        "__slots__",
    ]
)
_LIKE = {"": object, "generator": types.GeneratorType, "function": types.FunctionType}
_PLAIN = {base.__name__: base for base in BASES}
APPEARANCES: dict[str, type] = {**_LIKE, **_PLAIN}
"""What `isinstance` takes an object for: a generator, a function, or the plain type that it derives
from.
"""


class Proxy:
    """The operations of every object."""

    __slots__ = ("_appearance", "_number", "_tester")

    def __init__(self, number: int, tester: Any, appearance: str) -> None:
        for name, value in (("_number", number), ("_tester", tester), ("_appearance", appearance)):
            object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return APPEARANCES[self._appearance]

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_ANY:  # the proxy itself has these attributes too
            return self._tester.ask("get", self, name)
        return object.__getattribute__(self, name)

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if is_proxy(other):
            return self._tester.ask("eq", self, other) is True
        return self._plain() == other if self._appearance in _PLAIN else NotImplemented

    def _plain(self) -> Any:
        return self._tester.ask("plain", self)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._tester.ask("deepcopy", self)

    def __copy__(self) -> Any:
        return self._tester.ask("copy", self)

    def __hash__(self) -> int:
        return int(self._tester.ask("hash", self))

    def __bool__(self) -> bool:
        return self._tester.ask("bool", self) is True

    def __repr__(self) -> str:
        return str(self._tester.ask("repr", self))

    def __str__(self) -> str:
        return str(self._tester.ask("str", self))

    def __format__(self, spec: str) -> str:
        return str(self._tester.ask("format", self, spec))


class IteratorProxy:
    """An iterator."""

    __slots__ = ()
    _tester: Any

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._tester.ask("next", self)


class CallableProxy:
    """A function, a class, or another object that can be called."""

    __slots__ = ()
    _tester: Any

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._tester.ask("call", self, *args, **kwargs)


class ClassProxy:
    """A class of the program."""

    __slots__ = ()
    _tester: Any

    def __instancecheck__(self, instance: Any) -> bool:
        return is_proxy(instance) and self._tester.ask("isinstance", instance, self) is True

    def __subclasscheck__(self, other: Any) -> bool:
        return is_proxy(other) and self._tester.ask("issubclass", other, self) is True


class ObjectProxy:
    """An object that the tests use as an object: with operators, items, attributes, or as a context
    manager.
    """

    __slots__ = ()
    _tester: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        found = self._tester.ask("get", self, name)
        if is_proxy(found) and name in PLAIN_NAMES and not self._tester.read.operators:
            raise AttributeError(name)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        self._tester.ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._tester.ask("delete", self, name)

    def __dir__(self) -> Any:
        return self._tester.ask("dir", self)

    def __contains__(self, item: Any) -> bool:
        if not is_proxy(item) and not self._tester.read.operators:
            raise TypeError("an object of the program does not contain plain data")
        return self._tester.ask("contains", self, item) is True

    def __enter__(self) -> Any:
        return self._tester.ask("enter", self)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """The program may swallow an exception only if a `raise` of the tests caused it."""
        swallowed = bool(self._tester.ask("exit", self, kind, error, None))
        return swallowed and error is not None and self._tester.raised_by_tests(error)


def is_proxy(value: Any) -> bool:
    """Whether this value stands for an object of the program."""
    return issubclass(type(value), Proxy)


def _unary(what: str) -> Any:
    return lambda self, *args: self._tester.ask(what, self, *args)


def _binary(what: str, swapped: bool) -> Any:
    """An operator between an object and plain data. It is allowed only if the tests use operators
    on one of the program's classes: otherwise the object could answer `f(2) - 4` with the value
    that the tests expect.
    """

    def operate(self: Any, other: Any) -> Any:
        if not is_proxy(other) and not self._tester.read.operators:
            return NotImplemented
        return self._tester.ask(what, *((other, self) if swapped else (self, other)))

    return operate


def _ordered(what: str) -> Any:
    def compare(self: Any, other: Any) -> Any:
        if is_proxy(other):
            return self._tester.ask(what, self, other) is True
        if self._appearance in _PLAIN:
            return getattr(operator, what)(self._plain(), other)
        return NotImplemented

    return compare


for _name in ("lt", "le", "gt", "ge"):
    setattr(Proxy, f"__{_name}__", _ordered(_name))
for _name in (
    "len", "iter", "reversed", "getitem", "setitem", "delitem", "int", "float", "index",
    "complex", "abs", "round", "neg", "pos", "invert",
):  # fmt: skip
    setattr(ObjectProxy, f"__{_name}__", _unary(_name))
for _name in OPERATORS:
    setattr(ObjectProxy, f"__{_name}__", _binary(_name, False))
    setattr(ObjectProxy, f"__r{_name}__", _binary(_name, True))
    if _name != "divmod":
        setattr(ObjectProxy, f"__i{_name}__", _binary("i" + _name, False))


@cache
def proxy_class(abilities: tuple[str, ...], objects: bool) -> type[Proxy]:
    """The class of proxies for objects with these abilities."""
    bases: list[type] = []
    bases += [ClassProxy] if "class" in abilities else []
    bases += [IteratorProxy] if "next" in abilities else []
    bases += [CallableProxy] if "call" in abilities else []
    bases += [ObjectProxy] if objects else []
    return type("Thing", (*bases, Proxy), {"__slots__": ()})
