"""A function's mark changes with its source and with the values that it works with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from gearshift.runtime.function_marks import function_mark

SCALE = 1.0


def scaled(completions: list[str], scale: float = 1.0, **columns: Any) -> list[float]:
    return [scale * SCALE for _ in completions]


def around(value: Any) -> Callable[..., list[float]]:
    def inner(completions: list[str], **columns: Any) -> list[float]:
        return [value for _ in completions]

    return inner


class Scorer:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [self.scale] * len(completions)

    def method(self, completions: list[str], **columns: Any) -> list[float]:
        return [self.scale] * len(completions)


MAKERS: list[Callable[[float], Any]] = [
    around,
    lambda value: around({"weight": [value]}),
    lambda value: around(around(value)),
    lambda value: partial(scaled, scale=value),
    lambda value: partial(scaled, [], value),
    Scorer,
    lambda value: Scorer(value).method,
    lambda value: lambda completions, scale=value: [scale] * len(completions),
]


@pytest.mark.parametrize("make", MAKERS)
def test_another_value_is_another_mark(make: Callable[[float], Any]) -> None:
    assert function_mark(make(1.0)) == function_mark(make(1.0))
    assert function_mark(make(1.0)) != function_mark(make(2.0))


def test_a_global_number_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = function_mark(scaled)
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert function_mark(scaled) != before


def test_code_without_a_source_file_counts() -> None:
    made: list[dict[str, Any]] = [{}, {}, {}]
    for space, number in zip(made, (1, 1, 2), strict=True):
        exec(f"def f(completions): return [{number} for _ in completions]", space)
    marks = [function_mark(space["f"]) for space in made]
    assert marks[0] == marks[1] != marks[2]


def test_what_a_function_works_with_may_be_anything() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (loop, object(), print, [*range(5000)], {"a": {1, "b"}}, type("T", (), {})):
        assert function_mark(around(value)) == function_mark(around(value))
    assert function_mark(len)
