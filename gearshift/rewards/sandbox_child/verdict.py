"""The tests' side of the channel, which gives the verdict. A name that the tests use and do not
define belongs to the program, and is requested through the channel.

A program is wrong unless the tests come to their end. An answer that is not plain data becomes a
proxy (see `proxies`), which equals no plain data. The tests are unusable if no program could pass
them: they do not parse, they need what a sandbox does not have, or they never ask the program.
Only their text decides this.
"""

from __future__ import annotations

import builtins
import importlib
import operator
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

from gearshift.rewards.sandbox_child import FAILED, PASSED, UNUSABLE, analysis, harness, rewrite
from gearshift.rewards.sandbox_child.access import allowed_operation, library_name, rebuild_recipe
from gearshift.rewards.sandbox_child.analysis import TestAnalysis, UnusableError
from gearshift.rewards.sandbox_child.channel import DEEP_RECURSION, Channel, decode, encode
from gearshift.rewards.sandbox_child.program import plain_data, update_in_place
from gearshift.rewards.sandbox_child.proxies import APPEARANCES, Proxy, is_proxy, proxy_class

_MUTABLE = (list, dict, set, bytearray)


class StopError(Exception):
    """The program's `StopIteration`, as a class that ends no loop of the tests."""

    value: Any = None


StopError.__name__ = StopError.__qualname__ = "StopIteration"
_STOPS = (StopIteration, StopAsyncIteration, GeneratorExit)


class Space(dict[str, Any]):
    """The tests' global names; any other name is requested from the program."""

    def __init__(self, tester: Tester, **names: Any) -> None:
        super().__init__(names)
        self._tester = tester

    def __missing__(self, name: str) -> Any:
        for mark in (analysis.SOFT, analysis.HARD):
            if name.startswith(mark):
                try:
                    return self._tester.ask("name", name.removeprefix(mark))
                except NameError:
                    if mark == analysis.HARD:
                        raise
                    return getattr(builtins, name.removeprefix(mark))
        if hasattr(builtins, name) or name.startswith("__"):
            raise KeyError(name)
        return self._tester.ask("name", name)


class Tester:
    """The tests' end of the channel, with the objects that have crossed it in either direction."""

    def __init__(self, read: TestAnalysis, gets: BinaryIO, sends: BinaryIO) -> None:
        self.read = read
        self._channel = Channel(gets, sends, self._serve, self._wrong, read.nan)
        self.asked = False
        self.failed = False
        """An assertion failed in a function of the tests that the program called."""
        self.raised: list[BaseException] = []
        """The exceptions that the program raised."""
        self._unseen = False
        """The last of these exceptions has not been caught by the tests."""
        self._thrown: list[BaseException] = []
        """The exceptions of functions of the tests that the program called."""
        self._proxies: dict[int, Proxy] = {}
        self._given: list[Any] = []
        """The objects of the tests that the program knows, by number."""
        self._numbers: dict[int, int] = {}
        self._errors: dict[str, type[BaseException]] = {}
        self._parts: list[tuple[Any, str, Any, Any]] = []
        """Data that the tests got as an attribute: the object, the attribute's name, the data, and
        its encoded form at that time.
        """

    def settle(self) -> None:
        self.ask("settle", self.read.objects, self.read.prints)
        self.asked = False

    def ask(self, what: str, /, *args: Any, **kwargs: Any) -> Any:
        """The program's answer, or an exception that it raised. A program that does not answer is
        wrong at once, before the tests' own code can react.
        """
        self.asked = True
        self._give_back()
        if what != "name":  # the expression of an `except` may ask for a name
            self.seen(must=True)
        watched = self._watched(args) if what == "call" else []
        try:
            given = [encode(a, self._other) for a in args]
            named = {k: encode(v, self._other) for k, v in kwargs.items()}
            self._channel.send(["ask", [what, given, named, watched]])
        except (RecursionError, ValueError):
            unusable("they pass an argument that is nested too deeply, or too long")
        except OSError:
            self._wrong()
        error: BaseException | None
        try:
            answer, content, printed, changed, same = self._channel.wait()
            for place in watched:
                update_in_place(args[place], decode(changed[str(place)], self._received))
            if printed:
                sys.stdout.write(str(printed))
            if answer == "raised":
                error = self._error(*content)
            else:
                value = decode(content, self._received)
                value = next((args[i] for i in same if args[i] == value), value)
                error = StopIteration(value) if answer == "stop" else None
                assert what == "next" or answer == "value"
        except BaseException:
            self._wrong()
        if error is not None:
            self._unseen = what == "call"
            raise error
        if what == "get" and type(value) in _MUTABLE:
            self._parts.append((args[0], args[1], value, encode(value, self._other)))
        return value

    def _give_back(self) -> None:
        """Send data of an attribute that the tests have changed (`board.cells[0] = 1`) back to the
        program's object.
        """
        parts, self._parts = self._parts, []
        for owner, name, value, before in parts:
            now = encode(value, self._other)
            if now != before:
                self.ask("renew", owner, name, value)
            if sys.getrefcount(value) > 3:  # a variable of the tests holds it
                self._parts.append((owner, name, value, now))

    def seen(self, must: bool = False) -> None:
        """Record that the tests have caught the program's exception. With `must`, a program whose
        exception was not caught is wrong: Python swallowed it, for example in `hasattr`, and the
        tests would take it for an answer.
        """
        if must and self._unseen:
            self._wrong()
        self._unseen = False

    def _wrong(self) -> NoReturn:
        os._exit(FAILED)

    def raised_by_tests(self, error: BaseException) -> bool:
        """Whether a `raise` of the tests' own caused this exception."""
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        own = trace and trace.tb_frame.f_code.co_filename == analysis.TESTS
        return bool(own and trace and trace.tb_lineno in self.read.raises)

    def _watched(self, args: Any) -> list[int]:
        """The positions of arguments that are variables which the tests read later."""
        held: set[int] = set()
        frame = sys._getframe(2) if self.read.watched else None
        while frame:
            if frame.f_code.co_filename == analysis.TESTS:
                names = frame.f_locals
                held |= {id(names[n]) for n in self.read.watched if n in names}
            frame = frame.f_back
        return [i for i, a in enumerate(args) if id(a) in held and type(a) in _MUTABLE]

    def _other(self, value: Any) -> Any:
        """Encode a value that is not plain data."""
        if is_proxy(value):
            return ["yours", value._number]
        if isinstance(value, type) and value in self._errors.values():
            return ["error", value.__name__]
        if isinstance(value, (int, float, str, bytes)):
            return encode(plain_data(value), self._other)
        if found := library_name(value):
            return ["global", *found]
        if parts := rebuild_recipe(value):
            return ["made", *(encode(part, self._other) for part in parts)]
        number = self._numbers.setdefault(id(value), len(self._given))
        if number == len(self._given):
            self._given.append(value)
        return ["mine", number, str(getattr(value, "__name__", ""))]

    def _received(self, form: str, rest: list[Any]) -> Any:
        if form == "yours":
            return self._given[rest[0]]
        if form == "builtin":
            found = getattr(builtins, rest[0])
            assert isinstance(found, type)
            return found
        if form == "error":
            return self._error_class(rest[0])
        assert form == "mine"
        number, abilities, appearance = rest
        assert appearance in APPEARANCES
        if number not in self._proxies:
            made = proxy_class(tuple(abilities), self.read.objects)
            self._proxies[number] = made(number, self, appearance)
        return self._proxies[number]

    def _error_class(self, names: list[list[Any]]) -> type[BaseException]:
        """A class of exceptions: Python's own, or one that replaces the program's."""
        (name, known), *bases = names
        if known:
            found = getattr(builtins, name)
            assert isinstance(found, type) and issubclass(found, BaseException)
            ends = issubclass(found, _STOPS)
            return StopError if ends else found
        if name not in self._errors:
            base = self._error_class(bases)
            self._errors[name] = type(name, (base,), {"__str__": lambda self: self._text})
        return self._errors[name]

    def _error(
        self, names: list[list[Any]], args: list[Any], more: dict[str, Any], text: str, token: Any
    ) -> BaseException:
        if token is not None:
            return self._thrown[token]
        found = self._error_class(names)
        given = [decode(a, self._received) for a in args]
        try:
            error = found(*given)
        except Exception:  # its constructor needs other arguments
            error = found.__new__(found)
            error.args = (str(text),)
        if not names[0][1]:
            error._text = str(text)  # type: ignore[attr-defined]
        for name, value in more.items():
            if not name.startswith("_"):
                setattr(error, name, decode(value, self._received))
        if isinstance(error, StopError) and given:
            error.value = given[0]
        self.raised.append(error)
        return error

    def _serve(self, request: Any) -> Any:
        """Answer the program's request to an object of the tests that it received."""
        try:
            what, args, kwargs = request
            target, *given = (decode(a, self._received) for a in args)
            named = {k: decode(v, self._received) for k, v in kwargs.items()}
            assert id(target) in self._numbers
            do = allowed_operation(target, what, given)
        except BaseException:
            self._wrong()
        try:
            return ["value", encode(do(target, *given, **named), self._other)]
        except StopIteration:
            return ["stop"]
        except BaseException as error:
            self.seen()
            self.failed = self.failed or isinstance(error, AssertionError)
            self._thrown.append(error)
            names = [k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins"]
            texts = [str(a) if not isinstance(a, (int, float)) else a for a in error.args]
            return ["raised", names[0], texts, len(self._thrown) - 1]


def _next(iterator: Any) -> Any:
    """`next(iterator)`, in a form in which an iterator of the program ends no loop of the tests."""
    try:
        return next(iterator)
    except StopIteration as stop:
        if not is_proxy(iterator):
            raise
        error = StopError(*stop.args)
        error.value = stop.value
        raise error from None


def _compare(left: Any, names: tuple[str, ...], *others: Any) -> Any:
    """A comparison of order. With NaN the program is wrong: a negated test would pass without
    having compared anything.
    """
    result: Any = True
    for name, right in zip(names, others, strict=True):
        if any(type(x).__name__ in ("float", "Decimal") and x != x for x in (left, right)):
            os._exit(FAILED)
        result = _OPERATORS[name](left, right)
        if not result:
            return result
        left = right
    return result


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "Lt": operator.lt, "LtE": operator.le, "Gt": operator.gt, "GtE": operator.ge,
    "Eq": operator.eq, "NotEq": operator.ne, "Is": operator.is_, "IsNot": operator.is_not,
    "In": lambda a, b: a in b, "NotIn": lambda a, b: a not in b,
}  # fmt: skip


def unusable(why: str) -> NoReturn:
    """End the process with the verdict that no program could pass these tests."""
    print(why, file=sys.stderr, flush=True)
    os._exit(UNUSABLE)


def check(source: str, entry_point: str, gets: BinaryIO, sends: BinaryIO) -> NoReturn:
    """Run the tests and end the process with the verdict as its exit code."""
    sys.setrecursionlimit(DEEP_RECURSION)
    try:
        read = analysis.analyze(source, entry_point)
    except UnusableError as error:
        unusable(str(error))
    tester = Tester(read, gets, sends)
    own = {rewrite.COMPARE: _compare, rewrite.STOP: StopError}
    file = {"__name__": "__main__", "__file__": analysis.TESTS}
    space = Space(tester, **own, **file, math=importlib.import_module("math"))
    space[rewrite.TYPE] = lambda x: tester.ask("get", x, "__class__") if is_proxy(x) else type(x)
    space[rewrite.NEXT], space[rewrite.SEEN] = _next, tester.seen
    tester.settle()
    try:
        harness.prepare(space, read)
        for name in read.in_classes:
            with suppress(NameError):
                space.setdefault(name, space[name])
        exec(read.code, space)
        harness.run(space, read)
    except UnusableError as error:
        unusable(str(error))
    except SystemExit as error:
        if error.code or error in tester.raised:
            os._exit(FAILED)
    except BaseException:  # the tests have not come to their end
        os._exit(FAILED)
    tester.seen(must=True)
    if tester.failed:
        os._exit(FAILED)
    if not tester.asked:
        unusable("they never ask the program")
    os._exit(PASSED)
