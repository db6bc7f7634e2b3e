"""What stands in the sandboxes, where no sandbox is needed: plain data on the wire, and what the
text of tests says before a program is asked.
"""

import datetime
import io
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.rewards.sandbox_child.analysis import HARD, SOFT, UnusableError, analyze
from gearshift.rewards.sandbox_child.channel import Channel, decode, encode

KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.fractions()
LEAVES = (
    KEYS
    | st.floats(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.datetimes().map(lambda t: t.replace(fold=0))
    | st.dates()
    | st.times().map(lambda t: t.replace(fold=0))
    | st.timedeltas()
    | st.integers(-(10**30), 10**30).map(lambda n: range(n, n + 3))
)
PLAIN = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.dictionaries(KEYS, inner)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
        | st.lists(inner, max_size=3).map(lambda xs: deque(xs, 5))
        | st.dictionaries(KEYS, st.integers()).map(Counter)
    ),
    max_leaves=8,
)


def refuse(*given: Any) -> NoReturn:
    raise TypeError(given)


def across(value: Any) -> Any:
    """A value on the other side."""
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


def typed(value: Any) -> Any:
    """A value with the type of every part, in which an integer is no float."""
    if isinstance(value, dict):
        return type(value), [(typed(k), typed(v)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(typed, value))
    if isinstance(value, (list, tuple, deque)):
        return type(value), [typed(v) for v in value]
    return type(value), value


@settings(max_examples=50)
@given(PLAIN)
def test_plain_data_is_the_same_on_the_other_side(value: Any) -> None:
    assert typed(across(value)) == typed(value)


def test_what_json_does_not_have_is_the_same_too() -> None:
    assert across(10**5000) == 10**5000 and across(bytearray(b"x")) == bytearray(b"x")
    assert math.copysign(1, across(-0.0)) == -1 and across(math.inf) == math.inf
    assert across({1: 2}.keys()) == {1} and list(across({1: 2}.values())) == [2]
    assert across({1: 2}.items()) == {1: 2}.items()
    assert across(defaultdict(int, a=1)) == {"a": 1}
    assert type(across(Decimal("1.50"))) is Decimal and across(Fraction(1, 3)) == Fraction(1, 3)
    zone = datetime.timezone(datetime.timedelta(hours=2))
    assert across(datetime.datetime(2024, 1, 1, tzinfo=zone)).utcoffset() == zone.utcoffset(None)


def test_what_is_no_plain_data_does_not_cross_as_if_it_were() -> None:
    class Number(int):
        pass

    for value in (Number(3), object(), len, int, [object()], iter([])):
        with pytest.raises(TypeError):
            encode(value, refuse)


@pytest.mark.parametrize(
    "line", [b"", b"[1", b'["value", NaN]\n', b"x" * 100 + b"\n", b"[" * 10**5]
)
def test_a_line_that_is_none_is_refused(line: bytes) -> None:
    wire = Channel(io.BytesIO(line), io.BytesIO(), refuse, refuse, nan=False)
    with pytest.raises((EOFError, ValueError, RecursionError)):
        wire.read()


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert sum([1, 2]) == 3", {HARD + "sum"}),
        ("assert abs(sum([0.1]) - 0.1) < 1e-9", {HARD + "sum"}),
        ("for i in range(3):\n    assert max(i, 1) > 0", {HARD + "max"}),
        ("def check(c):\n    assert c(1) == 1\ncheck(abs)", {HARD + "abs"}),
        ("assert f(1) == 1\nassert len([1]) == 1", {SOFT + "len"}),
        ("assert abs(f(2) - 4) < 1e-9\nassert all(map(f, range(3)))", set()),
        ("xs = f(3)\nassert len(xs) == 3 and sorted(xs) == [1, 2, 3]", set()),
        ("def same(a, b):\n    assert sorted(a) == b\nsame(f(1), [1])", set()),
    ],
)
def test_which_builtins_are_the_programs(tests: str, names: set[str]) -> None:
    """Those of assertions that would test nothing else."""
    assert {name for name in analyze(tests).code.co_names if name.startswith("program ")} == names


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("assert f(3) == 9", ""),
        ("s = Stack()\ns.push(1)\nassert s.size() == 1", "objects"),
        ("s = Stack()\nassert 3 in s and s.pop() == 3", "objects operators"),
        ("assert abs(Solution().half(3) - 1.5) < 1e-9", "objects"),
        ("assert Vector(1, 2) * 2 == Vector(2, 4)", "objects operators"),
        ("import math\nassert math.isnan(f([]))", "nan"),
        ("x = f()\nassert x != x", "nan"),
        ("assert f('banana') == 'nan'.strip()", "nan"),
        ("xs = [2, 1]\nf(xs)\nassert xs == [1, 2]", "watched"),
        ("xs = [2, 1]\nk = f(xs)\nassert xs[:k] == [1]", "watched"),
        ("xs = [2, 1]\nassert f(xs) == sorted(xs)", ""),
        ("xs = [2, 1]\nys = f(xs)\nassert ys == sorted(xs)", ""),
        ("import re\nassert re.match('a', f(1)).group() == 'a'", ""),
    ],
)
def test_what_tests_speak_of(tests: str, said: str) -> None:
    found = analyze(tests)
    assert said.split() == [
        name for name in ("objects", "operators", "nan", "watched") if getattr(found, name)
    ]


@pytest.mark.parametrize(
    "tests",
    [
        "assert f(", "print(f(3))", "import no_such\nassert f(3)", "import asyncio\nassert f(3)",
        "class A(Base): pass\nassert A()", "assert f.__code__", "(" * 10_000 + "assert f(1)",
    ],
)  # fmt: skip
def test_what_can_be_put_to_no_program_is_refused_before_one_is_asked(tests: str) -> None:
    with pytest.raises(UnusableError):
        analyze(tests)
    assert analyze("try:\n    import no_such\nexcept ImportError:\n    pass\nassert f(3) == 9")
