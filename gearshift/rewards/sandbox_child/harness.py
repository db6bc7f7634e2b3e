"""Runs tests in functions and classes, as unittest and pytest do. It has the part of pytest that
such tests use (`raises`, `approx`, `mark.parametrize`, fixtures, `capsys`), because a sandbox has
the standard library only.
"""

from __future__ import annotations

import io
import math
import re
import sys
from contextlib import ExitStack
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from gearshift.rewards.sandbox_child.analysis import TestAnalysis, UnusableError

_RAN, _RAN_CASES = " ran", " ran cases"
"""Names that no tests can define; they record that the tests have begun."""


def prepare(space: dict[str, Any], read: TestAnalysis) -> None:
    """Make `pytest` importable for the tests, and let `unittest.main` run their classes."""
    if "pytest" in read.imports:
        pytest: Any = ModuleType("pytest")
        pytest.raises, pytest.approx, pytest.mark, pytest.fail = raises, Approx, _Mark(), _fail
        pytest.fixture, pytest.param = _fixture, _Param
        pytest.main = lambda *_, **__: run(space, read)
        pytest.__getattr__ = _not_here
        sys.modules["pytest"] = pytest
    if "unittest" in read.imports:
        import unittest

        unittest.main = lambda *_, **__: run_cases(space)  # type: ignore[assignment]


def run(space: dict[str, Any], read: TestAnalysis) -> int:
    """Run the tests that are defined and that the text does not run itself. It raises what they
    raise, and returns 0 otherwise.
    """
    if space.get(_RAN):
        return 0
    space[_RAN] = True
    for name in read.functions:
        _run_function(space[name], space)
    for name, value in list(space.items()):
        if name.startswith("Test") and isinstance(value, type) and not hasattr(value, "run"):
            for method in [m for m in dir(value) if m.startswith("test")]:
                test = value()
                for before in ("setup_class", "setup_method"):
                    if ready := getattr(test, before, None):
                        ready(**_arguments(ready, {"method": None}, space, ExitStack()))
                _run_function(getattr(test, method), space)
    if "unittest" in read.imports:
        run_cases(space)
    return 0


def run_cases(space: dict[str, Any]) -> None:
    """Raises `AssertionError` unless all of unittest's classes pass."""
    import unittest

    if space.get(_RAN_CASES):
        return
    space[_RAN_CASES] = True

    load = unittest.defaultTestLoader.loadTestsFromTestCase
    cases = [
        v for v in space.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)
        and v.__module__ == "__main__"
    ]  # fmt: skip
    result = unittest.TextTestRunner(io.StringIO()).run(unittest.TestSuite(map(load, cases)))
    if not result.wasSuccessful():
        raise AssertionError


def _run_function(test: Any, space: dict[str, Any]) -> None:
    for row in getattr(test, "rows", None) or [{}]:
        with ExitStack() as after:
            test(**_arguments(test, dict(row), space, after))


def _arguments(test: Any, known: dict[str, Any], space: Any, after: ExitStack) -> dict[str, Any]:
    """The arguments of a test or a fixture: those in `known`, and the values of fixtures, which are
    added to `known`.
    """
    import inspect  # importing it is slow, and most tests have no functions

    wanted = [p.name for p in inspect.signature(test).parameters.values() if p.default is p.empty]
    for name in wanted:
        if name in known:
            continue
        own = getattr(test, "__self__", None)
        fixture: Any = getattr(own, name, None) or dict.get(space, name)
        if name == "capsys":
            known[name] = _Capsys()
        elif hasattr(fixture, "is_fixture"):
            known[name] = made = fixture(**_arguments(fixture, known, space, after))
            if inspect.isgenerator(made):
                known[name] = next(made)
                after.callback(next, made, None)
        else:
            raise UnusableError(f"{test.__name__} wants {name}")
    return {name: known[name] for name in wanted}


def _fixture(function: Any = None, **more: Any) -> Any:
    if more.keys() - {"scope"}:
        _not_here(f"fixture({', '.join(more)})")
    if function is None:
        return _fixture
    function.is_fixture = True
    return function


class _Printed(NamedTuple):
    out: str
    err: str = ""


class _Capsys:
    """The text that was printed since the last call. (Tests that read standard error are
    refused.)
    """

    def __init__(self) -> None:
        self.readouterr()

    def readouterr(self) -> _Printed:
        printed: Any = sys.stdout
        text = printed.getvalue()
        printed.seek(0)
        printed.truncate()
        return _Printed(text)


class _Param(list[Any]):
    """`pytest.param`: the values of one row of a test."""

    def __init__(self, *values: Any, id: str = "") -> None:
        super().__init__(values)


def _fail(reason: str = "") -> None:
    raise AssertionError(reason)


def _not_here(name: str) -> NoReturn:
    raise UnusableError(f"there is no pytest.{name} in the sandbox")


def _label(*args: Any, **_: Any) -> Any:
    """A mark of pytest that has no effect here, with or without arguments."""
    return args[0] if args and callable(args[0]) else lambda test: test


class _Mark:
    def __getattr__(self, name: str) -> Any:
        if name in ("skip", "skipif", "xfail", "usefixtures", "asyncio"):
            _not_here(f"mark.{name}")
        return _label

    def parametrize(self, names: Any, values: Any, ids: Any = None) -> Any:
        listed = re.findall(r"\w+", names) if isinstance(names, str) else list(names)

        def mark(test: Any) -> Any:
            several = len(listed) > 1
            rows = [v if several or isinstance(v, _Param) else [v] for v in values]
            new = [dict(zip(listed, row, strict=True)) for row in rows]
            test.rows = [{**a, **b} for a in getattr(test, "rows", [{}]) for b in new]
            return test

        return mark


class raises:  # noqa: N801 - pytest's name
    """Passes if the block raises one of these exceptions, and `match` is found in its text."""

    def __init__(self, expected: Any, function: Any = None, *args: Any, match: str = "", **kw: Any):
        self.expected, self.match = expected, match
        self.value: BaseException | None = None
        if function is not None:
            with self:
                function(*args, **kw)

    @property
    def type(self) -> Any:
        return type(self.value)

    def __enter__(self) -> raises:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            raise AssertionError(f"it did not raise {self.expected}")
        if not isinstance(error, self.expected):
            return False
        assert re.search(self.match or "", str(error)), str(error)
        self.value = error
        return True


class Approx:
    """Equals a number that differs by at most 1e-6 times the expected value, or by at most 1e-12;
    and lists and dicts of such numbers.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None) -> None:
        self.expected = expected
        self.rel = rel if rel is not None else 0.0 if abs is not None else 1e-6
        self.abs = abs if abs is not None else 1e-12

    def __eq__(self, other: object) -> bool:
        return self._near(other, self.expected)

    def _near(self, a: Any, b: Any) -> bool:
        if isinstance(b, dict):
            return isinstance(a, dict) and a.keys() == b.keys() and all(
                self._near(a[k], b[k]) for k in b
            )  # fmt: skip
        if isinstance(b, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(self._near, a, b))
        if isinstance(a, (int, float)) and isinstance(b, (int, float)):
            return math.isclose(a, b, rel_tol=self.rel, abs_tol=self.abs)
        return bool(a == b)
