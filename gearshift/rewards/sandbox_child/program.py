"""The program's side of the channel: it carries out what the tests request of the program's names
and objects.

The program runs in the same process and could change all of this code. That gives it nothing: only
its own answers change.
"""

from __future__ import annotations

import builtins
import copy
import importlib
import io
import operator
import sys
from types import ModuleType
from typing import Any, BinaryIO

from gearshift.rewards.sandbox_child.channel import Channel, DeepRecursion, decode, encode

BASES: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
)
OPERATORS = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "lshift",
    "rshift", "and", "or", "xor",
)  # fmt: skip


def plain_data(value: Any) -> Any:
    """The plain data in an object whose class derives from a plain type."""
    for base in BASES:
        if issubclass(type(value), base):
            if base in (int, float, complex):
                return base.__pos__(value)
            if base in (str, bytes, bytearray):
                return base.__getitem__(value, slice(None))
            return dict(dict.items(value)) if base is dict else base(base.__iter__(value))
    raise TypeError(f"{type(value).__name__} holds no plain data")


def update_in_place(old: Any, new: Any) -> Any:
    """Make `old` equal to `new`, in place where possible, and return the result."""
    if type(old) is not type(new):
        return new
    if isinstance(old, list):
        same = len(old) == len(new)
        old[:] = [update_in_place(a, b) for a, b in zip(old, new, strict=True)] if same else new
    elif isinstance(old, dict):
        kept = {k: update_in_place(old[k], v) if k in old else v for k, v in new.items()}
        old.clear()
        old.update(kept)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    else:
        return new
    return old


OPERATIONS: dict[str, Any] = {
    "call": lambda f, /, *args, **kwargs: f(*args, **kwargs),
    "get": getattr, "set": setattr, "delete": delattr, "plain": plain_data, "format": format,
    "isinstance": isinstance, "issubclass": issubclass, "iter": iter, "next": next, "len": len,
    "str": str, "repr": repr, "hash": hash, "bool": bool, "int": int, "float": float, "abs": abs,
    "round": round, "complex": complex, "index": operator.index, "neg": operator.neg,
    "pos": operator.pos, "invert": operator.invert, "reversed": reversed, "dir": dir,
    "divmod": divmod, "pow": pow, "getitem": operator.getitem, "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains, "eq": operator.eq, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
    **{name: getattr(operator, name) for name in
       ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "lshift", "rshift", "xor")},
    **{"i" + name: getattr(operator, "i" + name) for name in OPERATORS if name != "divmod"},
    "renew": lambda x, name, new: update_in_place(getattr(x, name), new),
    "and": operator.and_, "or": operator.or_, "copy": copy.copy, "deepcopy": copy.deepcopy,
    "enter": lambda x: type(x).__enter__(x), "exit": lambda x, *a: type(x).__exit__(x, *a),
}  # fmt: skip


class TestsObject:
    """An object of the tests, as the program sees it: a function, or the public part of an
    object.
    """

    def __init__(self, server: Server, number: int, name: str) -> None:
        self.__dict__.update(_server=server, _number=number, __name__=name)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._server.ask("call", self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._server.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            self.__dict__[name] = value
        else:
            self._server.ask("set", self, name, value)

    def __iter__(self) -> Any:
        return self._server.ask("iter", self)

    def __next__(self) -> Any:
        return self._server.ask("next", self)

    def __len__(self) -> int:
        return int(self._server.ask("len", self))

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, key: Any) -> Any:
        return self._server.ask("getitem", self, key)


class Server:
    """Answers the requests of the tests, and keeps the objects that stay in this process."""

    def __init__(self, module: ModuleType, gets: BinaryIO, sends: BinaryIO) -> None:
        self.channel = Channel(gets, sends, self.serve, self._too_long)
        self.module = module
        self.objects = self.prints = False
        self.kept: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.tests_objects: dict[int, TestsObject] = {}

    def ask(self, what: str, /, *args: Any, **kwargs: Any) -> Any:
        """Send a request to the tests while their own request is being answered."""
        self.channel.send(["ask", self._request(what, args, kwargs)])
        kind, *rest = self.channel.wait()
        if kind == "value":
            return decode(rest[0], self._received)
        if kind == "stop":
            raise StopIteration
        error: Any = getattr(builtins, rest[0], RuntimeError)(*rest[1])
        error._of_the_tests = rest[2]
        raise error

    def _request(self, what: str, args: Any, kwargs: Any) -> Any:
        with DeepRecursion():
            return [
                what,
                [encode(a, self._other) for a in args],
                {k: encode(v, self._other) for k, v in kwargs.items()},
            ]

    def serve(self, request: Any) -> Any:
        what, args, kwargs, watched = request
        if what == "settle":
            self.objects, self.prints = args
            return ["value", None, "", {}, []]
        before, printed = sys.stdout, io.StringIO()
        given: list[Any] = []
        if self.prints:
            sys.stdout = printed
        try:
            with DeepRecursion():
                given += [decode(a, self._received) for a in args]
                named = {k: decode(v, self._received) for k, v in kwargs.items()}
            value = self._do(what, given, named)
            answer = ["value", self._encode(value)]
        except StopIteration as stop:
            stopped = what == "next"
            answer = ["stop", self._encode(stop.value)] if stopped else self._raised(stop)
            value = None
        except BaseException as error:  # also an exit, because the tests may expect one
            answer, value = self._raised(error), None
        finally:
            sys.stdout = before
        changed = {str(i): self._encode(given[i]) for i in watched if i < len(given)}
        same = [i for i, a in enumerate(given) if a is value and type(a) in BASES[5:]]
        return [*answer, printed.getvalue(), changed, same]

    def _too_long(self) -> Any:
        """The answer if another one is too long: an object that stays here."""
        return ["value", self._keep(object()), "", {}, []]

    def _do(self, what: str, given: list[Any], named: dict[str, Any]) -> Any:
        if what != "name":
            return OPERATIONS[what](*given, **named)
        if given[0] not in self.module.__dict__:
            raise NameError(f"name {given[0]!r} is not defined")
        return self.module.__dict__[given[0]]

    def _encode(self, value: Any) -> Any:
        """Encode a value; one that cannot be encoded (for example too deeply nested) stays here."""
        try:
            with DeepRecursion():
                return encode(value, self._other)
        except Exception:
            return self._keep(value)

    def _raised(self, error: BaseException) -> Any:
        try:
            text = str(error)[:10_000]
        except Exception:
            text = ""
        args = [self._encode(a) for a in error.args] if isinstance(error.args, tuple) else []
        more = {str(k): self._encode(v) for k, v in vars(error).items() if k[:1] != "_"}
        token = getattr(error, "_of_the_tests", None)
        return ["raised", [_names(type(error)), args, more, text, token]]

    def _other(self, value: Any) -> Any:
        """Encode a value whose type is not exactly a plain one."""
        kind = type(value)
        if kind is TestsObject:
            return ["yours", value._number]
        if isinstance(value, type):
            if issubclass(value, BaseException):
                return ["error", _names(value)]
            if value.__module__ == "builtins" and hasattr(builtins, value.__name__):
                return ["builtin", value.__name__]
        elif not self.objects and issubclass(kind, BASES):
            return encode(plain_data(value), self._other)
        return self._keep(value)

    def _keep(self, value: Any) -> Any:
        kind = type(value)
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        abilities = [
            ability
            for ability, has in (
                ("class", isinstance(value, type)),
                ("next", hasattr(kind, "__next__")),
                ("call", callable(value)),
            )
            if has
        ]
        base = next((base.__name__ for base in BASES if issubclass(kind, base)), "")
        appearance = kind.__name__ if kind.__name__ in ("generator", "function") else base
        return ["mine", self.numbers[id(value)], abilities, appearance]

    def _received(self, kind: str, rest: list[Any]) -> Any:
        if kind == "yours":
            return self.kept[rest[0]]
        if kind == "global":
            found: Any = importlib.import_module(rest[0])
            for name in rest[1].split("."):
                found = getattr(found, name)
            return found
        if kind == "made":
            call, args, state = (decode(part, self._received) for part in rest)
            made = call(*args)
            if state is not None and hasattr(made, "__setstate__"):
                made.__setstate__(state)
            elif state is not None:
                vars(made).update(state)
            return made
        if kind == "error":
            return self.module.__dict__[rest[0]]
        return self.tests_objects.setdefault(rest[0], TestsObject(self, *rest))


def _names(kind: type) -> list[list[Any]]:
    """The names of a class and of its base classes, each with whether it is one of Python's own."""
    return [[k.__name__, k.__module__ == "builtins"] for k in kind.__mro__[:50]]


def serve(module: ModuleType, gets: BinaryIO, sends: BinaryIO) -> None:
    """Answer until the tests have ended."""
    server = Server(module, gets, sends)
    while True:
        try:
            message = server.channel.read()
        except EOFError:
            return
        server.channel.answer(message[1])
