"""What the program may do with the tests' objects that it receives as arguments."""

from __future__ import annotations

import copyreg
import importlib
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

_OPEN = ("__main__", "io", "_io", "types", "unittest.mock")
"""The program may read and set public attributes of objects whose classes are in these modules."""


def allowed_operation(target: Any, what: str, given: list[Any]) -> Callable[..., Any]:
    """The function that does an operation. Calls and the public attributes of plain objects are
    allowed, but nothing through which the program could reach the tests' own variables.
    """
    if what == "call":
        return lambda f, *args, **kwargs: f(*args, **kwargs)
    if what in ("get", "set"):
        assert type(target).__module__ in _OPEN and not isinstance(target, types.FunctionType)
        assert isinstance(given[0], str) and not given[0].startswith("_")
        return getattr if what == "get" else setattr
    return {"iter": iter, "next": next, "len": len, "getitem": operator.getitem}[what]  # type: ignore[return-value]


def library_name(value: Any) -> tuple[str, str] | None:
    """The module and name of a function or class that also exists in the program's Python."""
    name = getattr(value, "__qualname__", None)
    owner = getattr(value, "__objclass__", value)
    module = getattr(owner, "__module__", None)
    if isinstance(value, types.ModuleType):
        return None
    if not isinstance(name, str) or not isinstance(module, str) or module == "__main__":
        return None
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return (module, name) if found is value and module in sys.stdlib_module_names else None


def rebuild_recipe(value: Any) -> list[Any] | None:
    """How the program can build an object of the standard library itself: the function to call, its
    arguments, and the object's state. None for objects that it cannot build: the tests' own
    objects, iterators, open files.
    """
    kind = type(value)
    if kind.__module__ in _OPEN or hasattr(kind, "__next__") or not library_name(kind):
        return None
    try:
        reduce = copyreg.dispatch_table.get(kind, lambda value: value.__reduce_ex__(2))
        call, args, *more = reduce(value)
    except TypeError:
        return None
    return [call, list(args), more[0] if more else None] if library_name(call) else None
