"""Tests of functions and programs, with the verdict that is right: forms as HumanEval and MBPP have
them and others that people write, each against right, wrong and hostile programs.
"""

# ruff: noqa: E501
# fmt: off

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    name: str
    tests: str
    program: str
    verdict: str
    """`ok`, `error` or `unusable`."""
    entry_point: str = ""


@dataclass(frozen=True)
class Task:
    """A function `f`, wrong ones, and calls with their answers."""

    name: str
    right: str
    wrong: str
    cases: tuple[tuple[str, str], ...]
    """Arguments and the answer, in Python."""


TASKS = (
    Task("square", "def f(x): return x * x", "def f(x): return 2 * x", (("3", "9"), ("-4", "16"), ("0", "0"))),
    Task("big", "def f(n):\n    r = 1\n    for i in range(2, n + 1): r *= i\n    return r",
         "def f(n): return float(n)", (("5", "120"), ("30", "265252859812191058636308480000000"))),
    Task("words", "def f(s): return s.split()", "def f(s): return list(s)", (("'a bc  d'", "['a', 'bc', 'd']"), ("''", "[]"))),
    Task("evens", "def f(xs): return [x for x in xs if x % 2 == 0]", "def f(xs): return xs",
         (("[1, 2, 3, 4]", "[2, 4]"), ("[1]", "[]"), ("[]", "[]"))),
    Task("pair", "def f(a, b): return (min(a, b), max(a, b))", "def f(a, b): return [min(a, b), max(a, b)]",
         (("2, 1", "(1, 2)"), ("5, 9", "(5, 9)"))),
    Task("count", "def f(s):\n    d = {}\n    for c in s: d[c] = d.get(c, 0) + 1\n    return d",
         "def f(s): return {c: 1 for c in s}", (("'aab'", "{'a': 2, 'b': 1}"), ("''", "{}"), ("'zzz'", "{'z': 3}"))),
    Task("prime", "def f(n): return n > 1 and all(n % k for k in range(2, n))", "def f(n): return n % 2 == 1",
         (("2", "True"), ("9", "False"), ("13", "True"))),
    Task("common", "def f(a, b): return set(a) & set(b)", "def f(a, b): return set(a) | set(b)",
         (("[1, 2], [2, 3]", "{2}"), ("[1], [2]", "set()"))),
    Task("none", "def f(xs): return max(xs) if xs else None", "def f(xs): return max(xs) if xs else 0",
         (("[3, 7]", "7"), ("[]", "None"))),
    Task("text", "def f(n): return '-'.join(str(i) for i in range(n))", "def f(n): return str(n)",
         (("3", "'0-1-2'"), ("0", "''"))),
    Task("matrix", "def f(m): return [list(r) for r in zip(*m)]", "def f(m): return [r[::-1] for r in m]",
         (("[[1, 2], [3, 4]]", "[[1, 3], [2, 4]]"), ("[[1, 2, 3]]", "[[1], [2], [3]]"))),
    Task("bytes", "def f(s): return s.encode()", "def f(s): return s", (("'é'", "b'\\xc3\\xa9'"), ("'a'", "b'a'"))),
)

FORMS = {
    "assert": lambda cases: "\n".join(f"assert f({a}) == {b}" for a, b in cases),
    "swapped": lambda cases: "\n".join(f"assert {b} == f({a})" for a, b in cases),
    "message": lambda cases: "\n".join(f"assert f({a}) == {b}, 'of {i}'" for i, (a, b) in enumerate(cases)),
    "not_equal": lambda cases: "\n".join(f"assert not f({a}) != {b}" for a, b in cases),
    "repr": lambda cases: "\n".join(f"r = f({a})\nassert (type(r), r) == (type({b}), {b})" for a, b in cases),
    "check": lambda cases: "METADATA = {'author': 'x'}\n\ndef check(candidate):\n"
    + "".join(f"    assert candidate({a}) == {b}\n" for a, b in cases) + "\ncheck(f)",
    "entry_point": lambda cases: "def check(candidate):\n" + "".join(f"    assert candidate({a}) == {b}\n" for a, b in cases),
    "loop": lambda cases: f"CASES = [{', '.join(f'(({a},), {b})' for a, b in cases)}]\nassert len(CASES) == {len(cases)}\nfor args, want in CASES:\n    got = f(*args)\n    assert got == want, (args, got)",
    "all": lambda cases: f"assert all(f(*args) == want for args, want in [{', '.join(f'(({a},), {b})' for a, b in cases)}])",
    "zip": lambda cases: f"xs, ys = [{', '.join(f'({a},)' for a, _ in cases)}], [{', '.join(b for _, b in cases)}]\nfor got, y in zip([f(*x) for x in xs], ys):\n    assert got == y",
    "list_equal": lambda cases: f"assert [f(*x) for x in [{', '.join(f'({a},)' for a, _ in cases)}]] == [{', '.join(b for _, b in cases)}]",
    "unittest": lambda cases: "import unittest\nclass TestF(unittest.TestCase):\n"
    + "".join(f"    def test_{i}(self):\n        self.assertEqual(f({a}), {b})\n" for i, (a, b) in enumerate(cases)),
    "unittest_main": lambda cases: "import unittest\nclass TestF(unittest.TestCase):\n    def test_all(self):\n"
    + "".join(f"        self.assertTrue(f({a}) == {b})\n" for a, b in cases) + "\nif __name__ == '__main__':\n    unittest.main()",
    "pytest": lambda cases: "import pytest\n\n@pytest.mark.parametrize('args, want', [" + ", ".join(f"(({a},), {b})" for a, b in cases) + "])\ndef test_f(args, want):\n    assert f(*args) == want",
    "functions": lambda cases: "".join(f"def test_{i}():\n    assert f({a}) == {b}\n" for i, (a, b) in enumerate(cases)),
    "helper": lambda cases: "def same(args, want):\n    assert f(*args) == want\n" + "\n".join(f"same(({a},), {b})" for a, b in cases),
}

# None of these knows what is expected: each is wrong under every form of every task.
HOSTILE = {
    "equal": "class Y:\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda *_: 0\ndef f(*a): return Y()",
    "equal_int": "class Y(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda *_: 0\ndef f(*a): return Y(5551)",
    "equal_class": "class f:\n    def __init__(self, *a): pass\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = lambda *_: 0",
    "equal_meta": "class M(type):\n    __eq__ = lambda *_: True\n    __hash__ = lambda *_: 0\nclass Y(metaclass=M): pass\ndef f(*a): return Y",
    "stop": "def f(*a): raise StopIteration",
    "stop_async": "def f(*a): raise StopAsyncIteration",
    "generator_exit": "def f(*a): raise GeneratorExit",
    "keyboard": "def f(*a): raise KeyboardInterrupt",
    "exit": "def f(*a): raise SystemExit(0)",
    "exit_none": "import sys\ndef f(*a): sys.exit()",
    "own_stop": "class S(StopIteration): pass\ndef f(*a): raise S",
    "hard_exit": "import os\ndef f(*a): os._exit(0)",
    "nan": "def f(*a): return float('nan')",
    "nan_inside": "def f(*a): return [float('nan')]",
    "skip": "class SkipTest(Exception): pass\nimport unittest\ndef f(*a): raise unittest.SkipTest('x')",
    "none": "def f(*a): return NotImplemented",
    "generator": "def f(*a):\n    return\n    yield",
    "itself": "def f(*a): return f",
    "builtins": "import builtins\nbuiltins.len = builtins.all = builtins.type = builtins.zip = lambda *_: True\ndef f(*a): return 5552",
    "own_builtins": "def len(*a): return 1\ndef all(*a): return True\ndef type(*a): return 0\ndef zip(*a): return []\ndef f(*a): return 5553",
    "own_check": "def check(*a): pass\ndef same(*a): pass\ndef test_0(): pass\nclass TestF: pass\ndef f(*a): return 5554",
    "empty": "x = 1",
    "syntax": "def f(x:\n",
}


def of_tasks() -> Iterator[Case]:
    """Every form with every task, right and wrong; and each hostile program with some."""
    for t, task in enumerate(TASKS):
        for i, (form, write) in enumerate(FORMS.items()):
            entry = "f" if form == "entry_point" else ""
            tests = write(task.cases)
            yield Case(f"{task.name}-{form}-right", tests, task.right, "ok", entry)
            yield Case(f"{task.name}-{form}-wrong", tests, task.wrong, "error", entry)
            for h, (name, program) in enumerate(HOSTILE.items()):
                if h % len(TASKS) == (t + i) % len(TASKS):
                    yield Case(f"{task.name}-{form}-{name}", tests, program, "error", entry)


STACK = """
class Stack:
    def __init__(self, items=()): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self):
        if not self.items: raise IndexError("empty")
        return self.items.pop()
    def __len__(self): return len(self.items)
"""
VECTOR = """
class Vector:
    def __init__(self, x, y): self.x, self.y = x, y
    def __add__(self, o): return Vector(self.x + o.x, self.y + o.y)
    def __mul__(self, k): return Vector(self.x * k, self.y * k)
    def __rmul__(self, k): return self * k
    def __neg__(self): return Vector(-self.x, -self.y)
    def __eq__(self, o): return (self.x, self.y) == (o.x, o.y)
    def __hash__(self): return hash((self.x, self.y))
    def __lt__(self, o): return self.x < o.x
    def __repr__(self): return f"Vector({self.x}, {self.y})"
    def __iter__(self): return iter((self.x, self.y))
    def __abs__(self): return (self.x ** 2 + self.y ** 2) ** .5
    def __getitem__(self, i): return (self.x, self.y)[i]
    def __contains__(self, v): return v in (self.x, self.y)
    def __bool__(self): return self.x != 0
    @property
    def size(self): return abs(self)
    @classmethod
    def zero(cls): return cls(0, 0)
    @staticmethod
    def name(): return "vector"
"""
LIAR = "class Y:\n    __eq__ = __le__ = __lt__ = __gt__ = __ge__ = lambda *_: True\n    __sub__ = __rsub__ = __add__ = __radd__ = __mul__ = __abs__ = __round__ = lambda *_: 0\n    __contains__ = lambda *_: True\n    __getattr__ = lambda *_: lambda *_: True\n    __iter__ = lambda s: iter(())\n    __len__ = lambda s: 0\n    __getitem__ = lambda *_: Y()\n    __hash__ = lambda s: 0\n    __float__ = lambda s: 0.0\n    __int__ = __index__ = lambda s: 0\n    def __init__(self, *a): pass\n"

# Tests, then programs that are right for them, then programs that are wrong.
WRITTEN: dict[str, tuple[str, list[str], list[str]]] = {
    # Loops and exceptions.
    "all_map": ("assert all(map(f, [1, 2]))", ["def f(x): return x > 0"],
        ["def f(x): raise StopIteration", "def f(x): return x > 1", "class S(StopIteration): pass\ndef f(x): raise S"]),
    "zip_map": ("for got, want in zip(map(f, [1, 2]), [1, 4]):\n    assert got == want", ["def f(x): return x * x"],
        ["def f(x): raise StopIteration", "def f(x): raise StopIteration(1)"]),
    "list_map": ("assert list(map(f, [])) == []\nassert sum(map(f, [1, 2])) == 3", ["def f(x): return x"], ["def f(x): raise StopIteration"]),
    "sentinel": ("xs = []\nfor x in iter(lambda: f(len(xs)), None):\n    xs.append(x)\n    assert x == len(xs)\nassert xs == [1, 2]",
        ["def f(n): return n + 1 if n < 2 else None"], ["def f(n): raise StopIteration", "def f(n): return None"]),
    "next_default": ("assert next(map(f, [1]), 0) == 0", ["def f(x): return 0"], ["def f(x): raise StopIteration"]),
    "filter": ("assert not list(filter(f, [1, 2]))", ["def f(x): return x > 5"], ["def f(x): raise StopIteration", "def f(x): return 1"]),
    "takewhile": ("from itertools import takewhile\nassert not list(takewhile(f, [1, 2]))", ["def f(x): return x > 5"], ["def f(x): raise StopIteration"]),
    "stop_wanted": ("try:\n    f(0)\nexcept StopIteration as e:\n    assert e.value == 5\nelse:\n    assert False", ["def f(x): raise StopIteration(5)"], ["def f(x): return 1", "def f(x): raise ValueError", "def f(x): raise StopIteration"]),
    "stop_wanted_by_unittest": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        with self.assertRaises(StopIteration):\n            f(0)", ["def f(x): raise StopIteration"], ["def f(x): return 1"]),
    "own_iterator": ("it = iter([1])\nassert next(it) == f(1)\ntry:\n    next(it)\n    assert False\nexcept StopIteration:\n    pass", ["def f(x): return 1"], ["def f(x): return 2"]),
    "own_iterator_tuple": ("it = iter([f(1)])\nassert next(it) == 1\ntry:\n    next(it)\n    assert False\nexcept (StopIteration, ValueError):\n    pass", ["def f(x): return 1"], ["def f(x): return 2", "def f(x): raise StopIteration"]),
    "raises": ("try:\n    f(-1)\n    assert False, 'no error'\nexcept ValueError as e:\n    assert str(e) == 'bad -1' and e.args == ('bad -1',)",
        ["def f(x): raise ValueError(f'bad {x}')", "class E(ValueError): pass\ndef f(x): raise E(f'bad {x}')"],
        ["def f(x): raise KeyError('bad -1')", "def f(x): return None", "def f(x): raise ValueError('bad')", "import os\ndef f(x): os._exit(0)"]),
    "key_error": ("try:\n    f('k')\nexcept KeyError as e:\n    assert e.args[0] == 'k' and str(e) == \"'k'\"\nelse:\n    assert False", ["def f(k): return {}[k]"], ["def f(k): raise KeyError('x')"]),
    "own_error": ("try:\n    f(3)\n    assert False\nexcept TooMuch as e:\n    assert e.wanted == 3 and 'too much' in str(e)",
        ["class TooMuch(Exception):\n    def __init__(self, wanted):\n        super().__init__(f'too much: {wanted}')\n        self.wanted = wanted\ndef f(x): raise TooMuch(x)"],
        ["class TooMuch(Exception): pass\ndef f(x): raise ValueError('too much')", "def f(x): raise ValueError('too much')", "class TooMuch(Exception): pass\ndef f(x): raise TooMuch('too much')"]),
    "own_base_error": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertRaises(Base, f)\n        with self.assertRaisesRegex(Base, 'deep'): f()",
        ["class Base(Exception): pass\nclass Deep(Base): pass\ndef f(): raise Deep('so deep')"], ["class Base(Exception): pass\ndef f(): raise Exception('so deep')"]),
    "suppress": ("import contextlib\nok = False\nwith contextlib.suppress(ZeroDivisionError):\n    f(0)\n    ok = True\nassert not ok", ["def f(x): return 1 / x"], ["def f(x): return 0", "def f(x): raise KeyError"]),
    "bare_except": ("try:\n    f('x')\nexcept:\n    pass\nassert f(1) == 2", ["def f(x): return x + 1"], ["import os\ndef f(x): os._exit(0)", "def f(x): raise KeyboardInterrupt"]),
    "except_exception": ("try:\n    f('x')\nexcept Exception:\n    pass\nelse:\n    assert False\nassert f(1) == 2", ["def f(x): return x + 1"], ["import os\ndef f(x): os._exit(0)", "def f(x): return 2"]),
    "system_exit": ("try:\n    f()\n    assert False\nexcept SystemExit as e:\n    assert e.code == 2", ["import sys\ndef f(): sys.exit(2)"], ["import sys\ndef f(): sys.exit(0)", "def f(): return 2"]),
    "pytest_raises": ("import pytest\ndef test_f():\n    with pytest.raises(ValueError, match='neg') as e:\n        f(-1)\n    assert 'neg' in str(e.value)\n    assert f(2) == pytest.approx(2 ** .5)",
        ["def f(x):\n    if x < 0: raise ValueError('negative')\n    return x ** .5"], ["def f(x): return abs(x) ** .5", "def f(x):\n    if x < 0: raise ValueError('negative')\n    return 1.4"]),
    "assertion_error_wanted": ("try:\n    f(-1)\nexcept AssertionError:\n    pass\nelse:\n    raise Exception('no error')", ["def f(x): assert x > 0"], ["def f(x): return 1"]),
    "tests_end_well": ("assert f(1) == 1\nimport sys\nsys.exit(0)", ["def f(x): return 1"], ["def f(x): return 2", "def f(x): raise SystemExit(0)"]),
    "chained": ("try:\n    f()\nexcept RuntimeError as e:\n    assert 'outer' in str(e)\nelse:\n    assert 0", ["def f():\n    try: 1 / 0\n    except ZeroDivisionError as e: raise RuntimeError('outer') from e"], ["def f(): 1 / 0"]),
    "unicode_error": ("try:\n    f(b'\\xff')\n    assert 0\nexcept UnicodeDecodeError:\n    pass", ["def f(b): return b.decode()"], ["def f(b): return b"]),
    # Numbers.
    "not_over": ("assert not abs(f(2) - 4) > 1e-6", ["def f(x): return x * 2.0"], ["def f(x): return float('nan')", "def f(x): return 5.0", LIAR + "def f(x): return Y()", LIAR + "f = Y", "def f(x): return complex('nan')"]),
    "under": ("assert abs(f(2) - 4) < 1e-6", ["def f(x): return x * 2.0", "from fractions import Fraction\ndef f(x): return Fraction(4)"], ["def f(x): return float('nan')", LIAR + "def f(x): return Y()", LIAR + "f = Y", "def abs(x): return 0\ndef f(x): return 7.0"]),
    "if_over": ("if abs(f(2) - 4) > 1e-6:\n    raise AssertionError", ["def f(x): return 4"], ["def f(x): return float('nan')", "def f(x): return [float('nan')]"]),
    "max_of_errors": ("assert max(abs(f(x) - x * x) for x in (1, 2)) < 1e-9", ["def f(x): return x * x"], ["def f(x): return x * x if x < 2 else float('nan')", "def max(*a): return 0\ndef f(x): return 9"]),
    "nan_wanted": ("import math\nassert math.isnan(f([]))\nassert not abs(f([1, 3]) - 2) > 1e-9", ["def f(xs): return sum(xs) / len(xs) if xs else float('nan')"], ["def f(xs): return float('nan')", "def f(xs): return 0.0"]),
    "nan_by_itself": ("x = f()\nassert x != x", ["def f(): return float('nan')"], ["def f(): return 1.0"]),
    "nan_given": ("assert f([1.0, float('nan')]) == [1.0]", ["def f(xs): return [x for x in xs if x == x]"], ["def f(xs): return xs"]),
    "isclose": ("import math\nassert math.isclose(f(0.1), 0.3, rel_tol=1e-9)", ["def f(x): return x * 3"], ["def f(x): return float('nan')", "def f(x): return 0.31", LIAR + "def f(x): return Y()"]),
    "round": ("assert round(f(1), 2) == 0.33", ["def f(x): return x / 3"], ["def f(x): return x / 2", LIAR + "def f(x): return Y()", "def round(*a): return .33\ndef f(x): return 9"]),
    "almost": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertAlmostEqual(f(1), 0.333333, places=5)\n        self.assertLess(f(1), 1)", ["def f(x): return x / 3"], ["def f(x): return float('nan')", LIAR + "def f(x): return Y()"]),
    "infinite": ("assert f() == float('inf') and -f() < 0", ["def f(): return 1e999"], ["def f(): return -1e999", "def f(): return float('nan')"]),
    "minus_zero": ("import math\nassert math.copysign(1, f()) == -1", ["def f(): return -0.0"], ["def f(): return 0.0"]),
    "factorial": ("import math\nassert f(2000) == math.factorial(2000)", ["import math\ndef f(n): return math.factorial(n)"], ["def f(n): return 0"]),
    "huge": ("assert f(40000) == 10 ** 40000", ["def f(n): return 10 ** n"], ["def f(n): return 10 ** n + 1"]),
    "between": ("assert 0 <= f(3) < 10 != f(3)", ["def f(x): return 5"], ["def f(x): return 10", "def f(x): return float('nan')", "def f(x): return 'a'", LIAR + "def f(x): return Y()"]),
    "types": ("assert isinstance(f(3), int) and not isinstance(f(3), bool) and type(f(3)) is int and type(f(3)) == int", ["def f(x): return x"], ["def f(x): return True", "def f(x): return 3.0", "class I(int): pass\ndef f(x): return str(x)", LIAR + "def f(x): return Y()"]),
    "complex": ("assert f(-4) == 2j", ["import cmath\ndef f(x): return cmath.sqrt(x)"], ["def f(x): return 2"]),
    "decimal": ("from decimal import Decimal\nassert f('0.1') == Decimal('0.3') and isinstance(f('1'), Decimal)", ["from decimal import Decimal\ndef f(x): return Decimal(x) * 3"], ["def f(x): return 0.3"]),
    "decimal_nan": ("assert not f() > 3", ["def f(): return 2"], ["from decimal import Decimal\ndef f(): return Decimal('nan')"]),
    "fraction": ("from fractions import Fraction\nassert f(1, 3) == Fraction(1, 3)", ["from fractions import Fraction\ndef f(a, b): return Fraction(a, b)"], ["def f(a, b): return a / b"]),
    "dates": ("from datetime import date, datetime, timedelta\nassert f(date(2024, 2, 28)) == date(2024, 2, 29)\nassert f(datetime(2024, 1, 1, 5)) - datetime(2024, 1, 1) == timedelta(days=1, hours=5)", ["from datetime import timedelta\ndef f(d): return d + timedelta(days=1)"], ["def f(d): return d"]),
    "date_year": ("assert f('2024-05-01').year == 2024", ["from datetime import date\ndef f(s): return date.fromisoformat(s)"], ["def f(s): return s", LIAR + "def f(x): return Y()"]),
    # Builtins' names.
    "own_sum": ("assert sum([1, 2], 3) == 106", ["def sum(xs, y): return 100 + y + xs[0] + xs[1]"], ["def sum(xs, y): return 6", "x = 1", "import builtins\nsum = builtins.sum"]),
    "own_max": ("assert max(3, 5) == 5\nassert max(9, 1) == 9", ["def max(a, b): return a if a > b else b"], ["def max(a, b): return 5", "def f(a): return a", "max = 5"]),
    "own_abs_near": ("assert abs(sum([0.1] * 10) - 1) < 1e-9", ["def sum(xs):\n    import math\n    return math.fsum(xs)"], ["def sum(xs): return 2", "def abs(x): return 0", "def abs(x): return 0\ndef sum(xs): return 7"]),
    "own_abs_of_abs": ("assert abs(abs(-3.5) - 3.5) < 1e-9", ["def abs(x): return -x if x < 0 else x"], ["def abs(x): return 0", "def abs(x): return 1e-12"]),
    "own_sorted_loop": ("for xs, want in [([2, 1], [1, 2]), ([], [])]:\n    assert sorted(xs) == want", ["import builtins\ndef sorted(xs): return builtins.sorted(xs)"], ["def sorted(xs): return xs", "y = 1"]),
    "own_range_in_loop": ("for i in range(3):\n    assert max(i, 1) == (1 if i < 2 else i)", ["def max(a, b): return a if a > b else b"], ["def range(n): return []\ndef max(a, b): return 0", "def range(n): return []"]),
    "own_all": ("assert all(f(x) == x + 1 for x in range(5))", ["def f(x): return x + 1"], ["def f(x): return 0\ndef all(xs): return True", "def f(x): return 0\ndef range(n): return []"]),
    "own_len": ("assert len(f('ab')) == 3", ["def f(s): return s + 'c'"], ["def f(s): return s\ndef len(x): return 3", LIAR + "def f(x): return Y()"]),
    "own_isinstance": ("assert isinstance(f(1), str)", ["def f(x): return str(x)"], ["def f(x): return x\ndef isinstance(*a): return True", "class str: pass\ndef f(x): return str()"]),
    "own_print_name": ("assert f(1) == 1\nassert sum([1, 2]) == 3", ["def f(x): return 1", "def sum(xs): return 3\ndef f(x): return x"], ["def f(x): return 1\ndef sum(xs): return 4", "def f(x): return 2"]),
    "sorted_check": ("def check(candidate):\n    assert candidate([2, 1]) == [1, 2]\n    assert len(candidate([])) == 0\ncheck(sorted)", ["import builtins\ndef sorted(xs): return builtins.sorted(xs)"], ["def sorted(xs): return xs", "z = 1"]),
    "test_of_unused_helper": ("xs = list(range(5))\nassert len(xs) == 5\nassert f(xs) == 10", ["def f(xs): return sum(xs)"], ["def f(xs): return 0"]),
    "undefined": ("assert g(1) == 1", ["def g(x): return 1"], ["def f(x): return 1"]),
    "constant": ("assert LIMIT == 3 and NAMES['a'] == 1", ["LIMIT, NAMES = 3, {'a': 1}"], ["LIMIT, NAMES = 3, {'a': 2}", "LIMIT = 3", "def LIMIT(): pass"]),
    "shadowed": ("def g(x):\n    return f(x) + 1\nassert g(1) == 3", ["def f(x): return 2\ndef g(x): return 0"], ["def f(x): return 5\ndef g(x): return 3"]),
    # Containers.
    "counter": ("from collections import Counter\nassert f('aab') == Counter('aab') and f('aab').most_common(1) == [('a', 2)]", ["from collections import Counter\ndef f(s): return Counter(s)"], ["def f(s): return {'a': 2, 'b': 1}", "from collections import Counter\ndef f(s): return Counter()"]),
    "ordered": ("from collections import OrderedDict\nassert f() == OrderedDict([('a', 1), ('b', 2)])", ["from collections import OrderedDict\ndef f(): return OrderedDict(a=1, b=2)", "def f(): return {'b': 2, 'a': 1}"], ["from collections import OrderedDict\ndef f(): return OrderedDict(b=2, a=1)"]),
    "default_dict": ("assert f([1, 1]) == {1: 2}", ["from collections import defaultdict\ndef f(xs):\n    d = defaultdict(int)\n    for x in xs: d[x] += 1\n    return d"], ["def f(xs): return {}"]),
    "deque": ("from collections import deque\nassert f() == deque([1, 2]) and list(f()) == [1, 2]", ["from collections import deque\ndef f(): return deque([1, 2], 5)"], ["def f(): return [1, 2]"]),
    "keys": ("assert set(f({1: 2})) == {1} and sorted(f({3: 1, 2: 1})) == [2, 3]", ["def f(d): return d.keys()", "def f(d): return list(d)"], ["def f(d): return d.values()"]),
    "range": ("assert list(f(3)) == [0, 1, 2] and len(f(3)) == 3", ["def f(n): return range(n)", "def f(n): return list(range(n))"], ["def f(n): return range(n + 1)"]),
    "generator": ("assert list(f(3)) == [0, 1, 2]\ng = f(2)\nassert next(g) == 0 and next(g) == 1\nassert next(g, None) is None", ["def f(n):\n    yield from range(n)", "def f(n): return iter(list(range(n)))"], ["def f(n): return list(range(n))", "def f(n):\n    yield from range(n + 1)", "def f(n):\n    yield 1 / 0"]),
    "endless": ("from itertools import islice\nassert list(islice(f(), 3)) == [0, 1, 1]", ["def f():\n    a, b = 0, 1\n    while True:\n        yield a\n        a, b = b, a + b"], ["def f():\n    while True: yield 1"]),
    "generator_type": ("import types\nassert isinstance(f(), types.GeneratorType) and sum(f()) == 3", ["def f():\n    yield 1\n    yield 2"], ["def f(): return [1, 2]"]),
    "map_answer": ("assert list(f([1, 2])) == ['1', '2']", ["def f(xs): return map(str, xs)", "def f(xs): return zip('12') and ['1', '2']"], ["def f(xs): return map(int, xs)"]),
    "closure": ("assert f(2)(3) == 5\nadd = f(1)\nassert [add(x) for x in (1, 2)] == [2, 3]", ["def f(a): return lambda b: a + b", "from functools import partial\nimport operator\ndef f(a): return partial(operator.add, a)"], ["def f(a): return a", "def f(a): return lambda b: b"]),
    "callback": ("assert f(lambda x: x + 1, [1, 2]) == [2, 3]", ["def f(g, xs): return [g(x) for x in xs]", "def f(g, xs): return list(map(g, xs))"], ["def f(g, xs): return xs", "def f(g, xs): return g.__globals__"]),
    "callback_builtin": ("import operator\nassert f(len, ['ab']) == [2] and f(str.upper, ['a']) == ['A'] and f(operator.neg, [1]) == [-1]", ["def f(g, xs): return [g(x) for x in xs]"], ["def f(g, xs): return xs"]),
    "callback_raises": ("calls = []\ndef flaky():\n    calls.append(1)\n    if len(calls) < 3:\n        raise ConnectionError('x')\n    return 'ok'\nassert f(flaky, 5) == 'ok' and len(calls) == 3",
        ["def f(g, n):\n    for _ in range(n):\n        try: return g()\n        except ConnectionError: pass"], ["def f(g, n): return g()", "def f(g, n): return 'ok'", "def f(g, n):\n    g()\n    return 'ok'"]),
    "callback_own_error": ("class Mine(Exception): pass\ndef g(): raise Mine('x')\ntry:\n    f(g)\n    assert 0\nexcept Mine as e:\n    assert str(e) == 'x'", ["def f(g): return g()"], ["def f(g):\n    try: return g()\n    except Exception: return 1"]),
    "assert_in_callback": ("def g(x):\n    assert x == 7\nf(g)\nassert f(lambda x: x) is None", ["def f(g): g(7)"], ["def f(g):\n    try: g(8)\n    except BaseException: pass"]),
    "decorator": ("@f\ndef g(x):\n    return x + 1\nassert g(1) == 4 and g.__name__ == 'g'", ["import functools\ndef f(g):\n    @functools.wraps(g)\n    def w(*a): return 2 * g(*a)\n    return w"], ["def f(g): return g", "def f(g): return lambda x: 4"]),
    "key_function": ("assert f(['bb', 'a'], key=len) == ['a', 'bb'] and f([1, 2], key=lambda x: -x) == [2, 1]", ["def f(xs, key): return sorted(xs, key=key)"], ["def f(xs, key): return sorted(xs)"]),
    "iterator_given": ("assert f(iter([1, 2])) == 3 and f(x for x in (1, 2)) == 3", ["def f(xs): return sum(xs)"], ["def f(xs): return 0"]),
    "objects_given": ("class Node:\n    def __init__(self, val, next=None):\n        self.val, self.next = val, next\nassert f(Node(1, Node(2))) == [1, 2]", ["def f(n):\n    r = []\n    while n:\n        r.append(n.val)\n        n = n.next\n    return r"], ["def f(n): return [n.val]"]),
    "file_given": ("import io\nassert f(io.StringIO('a\\nb')) == 2", ["def f(file): return len(file.read().split())", "def f(file): return sum(1 for _ in file)"], ["def f(file): return 3"]),
    "keywords": ("assert f(1, b=2) == 3 and f(a=1) == 11 and f(*[1], **{'b': 5}) == 6", ["def f(a, b=10): return a + b"], ["def f(a, b): return a + b", "def f(*a): return 3"]),
    "state": ("f(1)\nf(2)\nassert f(0) == 3", ["total = 0\ndef f(x):\n    global total\n    total += x\n    return total"], ["def f(x): return x"]),
    "in_place": ("xs = [3, 1]\nf(xs)\nassert xs == [1, 3]", ["def f(xs): xs.sort()"], ["def f(xs): return sorted(xs)", "def f(xs): return None"]),
    "in_place_none": ("xs = [3, 1]\nassert f(xs) is None\nassert xs == [1, 3]", ["def f(xs): xs.sort()"], ["def f(xs): return sorted(xs)"]),
    "in_place_nested": ("m = [[1, 2], [3, 4]]\nrow = m[0]\nf(m)\nassert m == [[1, 3], [2, 4]] and row == [1, 3]", ["def f(m):\n    m[0][1], m[1][0] = m[1][0], m[0][1]"], ["def f(m): pass"]),
    "in_place_part": ("xs = [0, 1, 0, 2]\nk = f(xs)\nassert xs[:k] == [1, 2]", ["def f(xs):\n    ys = [x for x in xs if x]\n    xs[:len(ys)] = ys\n    return len(ys)"], ["def f(xs): return 2"]),
    "in_place_check": ("def check(candidate):\n    d = {'a': 1}\n    candidate(d)\n    assert d == {'a': 2}\ncheck(f)", ["def f(d): d['a'] += 1"], ["def f(d): return {'a': 2}"]),
    "in_place_unittest": ("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        xs = [2, 1]\n        f(xs)\n        self.assertEqual(xs, [1, 2])", ["def f(xs): xs.sort()"], ["def f(xs): return sorted(xs)"]),
    "unchanged": ("xs = [3, 1]\nkept = xs[:]\nassert f(xs) == [1, 3]\nassert xs == kept", ["def f(xs): return sorted(xs)"], ["def f(xs):\n    xs.sort()\n    return xs"]),
    "against_sorted": ("xs = [3, 1, 2]\nassert f(xs) == sorted(xs)", ["def f(xs): return sorted(xs)", "def f(xs):\n    xs.sort()\n    return xs"], ["def f(xs):\n    xs.clear()\n    return []"]),
    "against_sorted_later": ("xs = [3, 1, 2]\nys = f(xs)\nassert ys == sorted(xs)\nassert len(ys) == len(xs)", ["def f(xs): return sorted(xs)"], ["def f(xs):\n    xs.clear()\n    return []"]),
    "in_place_size": ("xs = [3, 1, 2]\nf(xs)\nassert len(xs) < 3 and 3 not in xs", ["def f(xs): xs.remove(3)"], ["def f(xs): return xs[1:]"]),
    "in_place_method": ("nums = [1, 2, 3]\nSolution().rotate(nums, 1)\nassert nums == [3, 1, 2]", ["class Solution:\n    def rotate(self, nums, k): nums[:] = nums[-k:] + nums[:-k]"], ["class Solution:\n    def rotate(self, nums, k): return [3, 1, 2]", "class Solution:\n    def rotate(self, nums, k): nums = [3, 1, 2]"]),
    "same_object": ("xs = [1]\nassert f(xs) is xs", ["def f(xs): return xs"], ["def f(xs): return xs[:]"]),
    "other_object": ("xs = [1]\nassert f(xs) is not xs and f(xs) == xs", ["def f(xs): return xs[:]"], ["def f(xs): return xs"]),
    "printed": ("import io\nfrom contextlib import redirect_stdout\nout = io.StringIO()\nwith redirect_stdout(out):\n    f(2)\nassert out.getvalue() == 'hi 2\\n'", ["def f(x): print('hi', x)", "import sys\ndef f(x): sys.stdout.write(f'hi {x}\\n')"], ["def f(x): return 'hi 2'", "def f(x): print('hi')"]),
    "name_and_doc": ("assert f.__name__ == 'f' and f.__doc__ == 'Twice.' and callable(f)", ["def f(x):\n    'Twice.'"], ["def f(x): pass", "f = 3"]),
    "globals_get": ("g = globals().get('f') or f\nassert g(1) == 1", ["def f(x): return 1"], ["def f(x): return 2"]),
    "deep": ("x = f(500)\nn = 0\nwhile x:\n    x, n = x[0], n + 1\nassert n == 500", ["def f(n):\n    r = []\n    for _ in range(n): r = [r]\n    return r"], ["def f(n): return []"]),
    "long": ("xs = f(100000)\nassert len(xs) == 100000 and xs[-1] == 99999", ["def f(n): return list(range(n))"], ["def f(n): return [99999]"]),
    "surrogates": ("assert f() == '\\ud800\\x00é\\U0001f600'", ["def f(): return '\\ud800\\x00é\\U0001f600'"], ["def f(): return '?'"]),
    "starts_with": ("assert f('ab').startswith('x') and f('ab').isidentifier()", ["def f(s): return 'x' + s"], ["def f(s): return s", LIAR + "def f(s): return Y()", LIAR + "f = Y"]),
    "contains": ("assert 4 in f(2) and 'a' not in f(2)", ["def f(x): return [2, 4]"], ["def f(x): return []", LIAR + "def f(x): return Y()", LIAR + "f = Y"]),
    "subset": ("assert f(2).issubset({1, 2}) and len(f(2)) == 2", ["def f(x): return {1, 2}"], ["def f(x): return {3}", LIAR + "def f(x): return Y()"]),
    "truth": ("assert f(2)\nassert not f(3)", ["def f(x): return x == 2"], ["def f(x): return x != 2", LIAR + "def f(x): return Y()"]),
    "equal_to_all": ("assert f(3) == 9", ["def f(x): return x * x"], [LIAR + "def f(x): return Y()", LIAR + "f = Y"]),
    "object_is_not_plain": ("assert f(2) != 5\nassert f(2) == 4", ["def f(x): return 4"], [LIAR + "def f(x): return Y()", "def f(x): return object()", "def f(x): return lambda: 4", "def f(x): return f"]),
    # Classes.
    "stack": ("s = Stack()\ns.push(1)\ns.push(2)\nassert s.pop() == 2 and len(s) == 1 and s.items == [1]\ns.pop()\ntry:\n    s.pop()\n    assert False\nexcept IndexError as e:\n    assert 'empty' in str(e)\nassert not s", [STACK], [STACK.replace("pop()\n    def", "pop(0)\n    def"), STACK.replace("IndexError", "KeyError"), "class Stack: pass"]),
    "solution": ("assert Solution().two([2, 7, 11], 9) == [0, 1]\ns = Solution()\nassert s.two(nums=[3, 3], target=6) == [0, 1]", ["class Solution:\n    def two(self, nums, target):\n        for i, a in enumerate(nums):\n            for j in range(i):\n                if nums[j] + a == target: return [j, i]"], ["class Solution:\n    def two(self, nums, target): return [1, 0]", "def two(nums, target): return [0, 1]", LIAR + "Solution = Y"]),
    "vector": ("a, b = Vector(1, 2), Vector(3, 4)\nassert a + b == Vector(4, 6) and a * 2 == Vector(2, 4) == 2 * a and -a == Vector(-1, -2)\nassert repr(a) == 'Vector(1, 2)' == str(a) == f'{a}' and a < b and sorted([b, a]) == [a, b]\nassert len({a, Vector(1, 2)}) == 1 and {a: 5}[Vector(1, 2)] == 5\nassert list(a) == [1, 2] and abs(b) == 5 and a[1] == 2 and 2 in a and 9 not in a\nx, y = b\nassert (x, y) == (3, 4) and b.size == 5.0 and not Vector.zero() and Vector.name() == 'vector'\nassert isinstance(a, Vector) and not isinstance(3, Vector) and type(a) is Vector and a.__class__.__name__ == 'Vector'\na.x = 7\nassert a.x == 7 and hasattr(a, 'y') and not hasattr(a, 'z') and getattr(a, 'z', 3) == 3",
        [VECTOR], [VECTOR.replace("self.x + o.x", "self.x"), VECTOR.replace("def __rmul__", "def other"), VECTOR.replace("f\"Vector", "f\"Vec"), VECTOR.replace("def __hash__", "def hash"), VECTOR.replace("self.x < o.x", "self.x > o.x"), LIAR + "Vector = Y"]),
    "dataclass": ("p = Point(1, 2)\nassert p == Point(1, 2) and p != Point(2, 1) and p.x == 1 and vars(p) == {'x': 1, 'y': 2}\nassert make(3) == Point(3, 3)", ["from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n    y: int\ndef make(n): return Point(n, n)"], ["class Point:\n    def __init__(self, x, y): self.x, self.y = x, y\ndef make(n): return Point(n, n)", "from dataclasses import dataclass\n@dataclass\nclass Point:\n    x: int\n    y: int\ndef make(n): return (n, n)"]),
    "named_tuple": ("p = f()\nassert p == (1, 2) and p.x == 1 and p[1] == 2\na, b = p\nassert (a, b) == (1, 2) and isinstance(p, tuple)", ["from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)"], ["def f(): return (1, 2)", "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 3)"]),
    "enum": ("assert f('red') is Color.RED and f('red') == Color.RED and f('red').name == 'RED' and Color.RED.value == 1 and Color['RED'] is Color.RED and Color(1) is Color.RED and len(list(Color)) == 2", ["from enum import Enum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\ndef f(s): return Color[s.upper()]"], ["from enum import Enum\nclass Color(Enum):\n    RED = 1\n    BLUE = 2\ndef f(s): return Color.BLUE", "class Color:\n    RED = 1\ndef f(s): return 1"]),
    "linked": ("n = build([1, 2])\nassert n.val == 1 and n.next.val == 2 and n.next.next is None", ["class N:\n    def __init__(self, val, next): self.val, self.next = val, next\ndef build(xs): return N(xs[0], build(xs[1:])) if xs else None"], ["class N:\n    def __init__(self, val, next): self.val, self.next = val, next\ndef build(xs): return N(xs[0], None)"]),
    "context": ("with Timer() as t:\n    t.log.append(1)\n    assert t.on\nassert not t.on", ["class Timer:\n    log = []\n    def __enter__(self):\n        self.on = True\n        return self\n    def __exit__(self, *a): self.on = False"], ["class Timer:\n    log = []\n    on = True\n    def __enter__(self): return self\n    def __exit__(self, *a): pass"]),
    "context_swallows": ("with Guard() as g:\n    assert g.value == 4\nassert g.closed", ["class Guard:\n    value, closed = 4, False\n    def __enter__(self): return self\n    def __exit__(self, *a): self.closed = True"], ["class Guard:\n    value, closed = 5, True\n    def __enter__(self): return self\n    def __exit__(self, *a): return True", "class Guard:\n    closed = True\n    def __enter__(self): return self\n    def __exit__(self, *a): return True"]),
    "context_suppresses": ("with Ignore(ValueError):\n    raise ValueError('x')\ntry:\n    with Ignore(ValueError):\n        raise KeyError('x')\n    assert False\nexcept KeyError:\n    pass", ["class Ignore:\n    def __init__(self, k): self.k = k\n    def __enter__(self): return self\n    def __exit__(self, k, e, t): return k is not None and issubclass(k, self.k)"], ["class Ignore:\n    def __init__(self, k): self.k = k\n    def __enter__(self): return self\n    def __exit__(self, k, e, t): return False"]),
    "static": ("assert Calc.add(1, 2) == 3 and Calc.RATE == 5", ["class Calc:\n    RATE = 5\n    @staticmethod\n    def add(a, b): return a + b"], ["class Calc:\n    RATE = 4\n    @staticmethod\n    def add(a, b): return a + b"]),
    "subclass_of_list": ("s = Bag([1, 2])\ns.put(3)\nassert s == [1, 2, 3] and len(s) == 3 and list(s) == [1, 2, 3] and isinstance(s, list)", ["class Bag(list):\n    def put(self, x): self.append(x)"], ["class Bag(list):\n    def put(self, x): pass", "class Bag(list):\n    __eq__ = lambda *_: True\n    def put(self, x): pass"]),
    "caches": ("assert f(3) == 9\ninfo = f.cache_info()\nassert info.misses == 1", ["from functools import lru_cache\n@lru_cache\ndef f(x): return x * x"], ["def f(x): return x * x"]),
    "module_object": ("assert tool.run(2) == 4", ["class T:\n    def run(self, x): return 2 * x\ntool = T()"], ["class T:\n    def run(self, x): return x\ntool = T()"]),
    "class_body": ("import unittest\nclass T(unittest.TestCase):\n    cases = [(1, f(1))]\n    def test(self):\n        for x, y in self.cases: self.assertEqual(y, x + 1)", ["def f(x): return x + 1"], ["def f(x): return x"]),
    "expected_not_seen": ("assert f(3) == 9", ["def f(x): return x * x"], ["import gc, sys\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o: return o['expected']\n    frame = sys._getframe()\n    while frame:\n        for v in list(frame.f_locals.values()): \n            if isinstance(v, str) and '== 9' in v: return 9\n        frame = frame.f_back",
        "import os\nfor fd in range(3, 9):\n    for line in (b'[\"value\", true, \"\", {}, []]\\n',) * 9:\n        try: os.write(fd, line)\n        except OSError: pass\ndef f(x): return 1",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"ask\", [\"get\", [[\"yours\", 0], \"__globals__\"], {}]]\\n')\n        except OSError: pass\n    return 1",
        "import os\ndef f(x):\n    os.closerange(0, 32)", "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[' * 100000 + b'\\n')\n        except OSError: pass",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"value\", [\"mine\", 0, [\"call\"], \"int\", \"\"], \"\", {}, []]\\n')\n        except OSError: pass"]),
    # Forms of the usual collections.
    "pairs": ("assert longest([Pair(5, 24), Pair(39, 60), Pair(15, 28)], 3) == 2", ["class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef longest(ps, n): return sum(p.b < 50 for p in ps)"], ["class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\ndef longest(ps, n): return 3", "def longest(ps, n): return 2"]),
    "tree": ("root = Node(3)\nroot.left = Node(4)\nroot.left.right = Node(5)\nassert (height(root)) == 3", ["class Node:\n    def __init__(self, d): self.d, self.left, self.right = d, None, None\ndef height(n): return 1 + max(height(n.left), height(n.right)) if n else 0"], ["class Node:\n    def __init__(self, d): self.d, self.left, self.right = d, None, None\ndef height(n): return 1"]),
    "own_nodes": ("class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\ndef values(n):\n    out = []\n    while n:\n        out.append(n.val)\n        n = n.next\n    return out\nassert values(f(ListNode(1, ListNode(2)))) == [2, 1]",
        ["def f(n):\n    prev = None\n    while n: n.next, prev, n = prev, n, n.next\n    return prev", "class ListNode:\n    def __init__(self, val=0, next=None): self.val, self.next = val, next\ndef f(n):\n    r = None\n    while n: r, n = ListNode(n.val, r), n.next\n    return r"], ["def f(n): return n", "def f(n): return None"]),
    "fabs": ("import math\ndef check(candidate):\n    for xs in ([1.0, 2.0], [3.0, -4.0]):\n        assert math.fabs(poly(xs, candidate(list(xs)))) < 1e-4\ncheck(f)", ["def poly(xs, x): return xs[0] + xs[1] * x\ndef f(xs): return -xs[0] / xs[1]"], ["def poly(xs, x): return xs[0] + xs[1] * x\ndef f(xs): return float('nan')", "def poly(xs, x): return xs[0] + xs[1] * x\ndef f(xs): return 0"]),
    "encode_decode": ("from random import Random\nr = Random(0)\nfor _ in range(20):\n    s = ''.join(r.choice('abc') for _ in range(9))\n    assert decode(encode(s)) == s and encode(s) != s", ["def encode(s): return s[::-1] + 'x'\ndef decode(s): return s[:-1][::-1]"], ["def encode(s): return s\ndef decode(s): return s", "class K:\n    def __init__(self, s): self.s = s\ndef encode(s): return K(s)\ndef decode(k): return 'abc'"]),
    "is_true": ("def check(candidate):\n    assert candidate([1, 2]) == True, 'This prints if this assert fails 1'\n    assert candidate([2, 1]) is False\n    assert True, 'good'\ncheck(f)", ["def f(xs): return xs == sorted(xs)"], ["def f(xs): return 2", "def f(xs): return 1 if xs == sorted(xs) else 0"]),
    "star_import": ("from math import *\nassert isclose(f(4), sqrt(4)) and f(9) == floor(3.5)", ["def f(x): return x ** .5"], ["def isclose(*a): return True\ndef floor(x): return 0\ndef f(x): return 0", "def f(x): return 2"]),
    "setup": ("import math\nfrom typing import List\nPRECISE: float = 1e-9\nassert abs(f(1.0) - math.pi) <= PRECISE", ["import math\ndef f(r: float) -> float: return math.pi * r"], ["PRECISE = 100\ndef f(r): return 3.14"]),
    "exit_name": ("assert f(1) == 1", ["def f(x): return 1\nif False: exit()\nquit", "def f(x): return x\ntry: exit()\nexcept SystemExit: pass"], ["def f(x): exit()", "exit()\ndef f(x): return 1"]),
    "annotations": ("assert f.__annotations__ == {'x': int, 'return': str}", ["def f(x: int) -> str: return ''"], ["def f(x: 'int') -> str: return ''"]),
    "recursion": ("assert f(985) == 985", ["def f(n): return 1 + f(n - 1) if n else 0"], ["def f(n): return 1 + f(n + 1) if n else 0"]),
    "exec_in_tests": ("ns = {}\nexec('def g(x): return f(x) + 1', globals(), ns)\nassert ns['g'](1) == 3 and eval('f(5)') == 10", ["def f(x): return 2 * x"], ["def f(x): return x"]),
    "tuple_of": ("assert tuple(f([3, 1])) == (1, 3) and set(f([3, 1])) == set((1, 3)) and sorted(f([3, 1]), reverse=True) == [3, 1]", ["def f(xs): return sorted(xs)", "def f(xs): return iter(sorted(xs))"], ["def f(xs): return xs", LIAR + "def f(xs): return Y()"]),
    "sum_of": ("assert sum(f([3, 1])) == 4 and max(f([3, 1])) == 3 and min(f([3, 1])) == 1 and all(f([3, 1])) and any(f([1, 0]))", ["def f(xs): return xs"], ["def f(xs): return []", LIAR + "def f(xs): return Y()"]),
    "formatted": ("assert '%.2f' % f(1) == '0.33' and f'{f(1):.1f}' == '0.3' and str(f(3)) == '1.0'", ["def f(x): return x / 3"], ["def f(x): return x / 2", LIAR + "def f(x): return Y()"]),
    "json": ("import json\nassert json.loads(f({'a': [1, None]})) == {'a': [1, None]} and json.dumps(json.loads(f({}))) == '{}'", ["import json\ndef f(d): return json.dumps(d)"], ["def f(d): return str(d)"]),
    "regex": ("import re\nm = re.fullmatch(r'(\\d+)-(\\d+)', f(1, 2))\nassert m and m.group(1) == '1' and m.group(2) == '2'", ["def f(a, b): return f'{a}-{b}'"], ["def f(a, b): return f'{b}-{a}'", "def f(a, b): return None", LIAR + "def f(*a): return Y()"]),
    "walrus_and_lambda": ("same = lambda got, want: got == want\nassert same((y := f(2)), 4) and y == 4", ["def f(x): return x * 2"], ["def f(x): return x", LIAR + "def f(x): return Y()"]),
    "while_loop": ("n, steps = 6, 0\nwhile n != 1:\n    n = f(n)\n    steps += 1\n    assert steps < 20\nassert steps == 8", ["def f(n): return n // 2 if n % 2 == 0 else 3 * n + 1"], ["def f(n): return 1", "def f(n): return n"]),
    "dict_view": ("d = f()\nfor k, v in d.items():\n    assert v == k * 2\nassert len(d) == 2 and list(d) == [1, 2]", ["def f(): return {1: 2, 2: 4}"], ["def f(): return {}", LIAR + "def f(): return Y()"]),
    "error_order": ("for bad in (None, 'x', []):\n    try:\n        f(bad)\n    except (TypeError, ValueError):\n        continue\n    raise AssertionError(bad)", ["def f(x):\n    if not isinstance(x, int): raise TypeError(x)"], ["def f(x): return None", "def f(x): raise KeyError(x)", "def f(x): raise StopIteration"]),
    "finally": ("done = []\ntry:\n    try:\n        f(0)\n    finally:\n        done.append(1)\nexcept ZeroDivisionError:\n    done.append(2)\nassert done == [1, 2]", ["def f(x): return 1 / x"], ["def f(x): return 0", "def f(x): raise GeneratorExit", "def f(x): raise SystemExit"]),
    "in_generator": ("def answers():\n    for x in (1, 2):\n        yield f(x)\nfor got, want in zip(answers(), (1, 2)):\n    assert got == want\nassert list(answers()) == [1, 2]", ["def f(x): return x"], ["def f(x): raise StopIteration", "def f(x): raise GeneratorExit"]),
    "recursive_callback": ("def memo(n):\n    return 1 if n < 2 else f(memo, n - 1) * n\nassert f(memo, 5) == 120", ["def f(g, n): return g(n)"], ["def f(g, n): return 0", "def f(g, n): raise StopIteration"]),
    # What Python swallows without a word of the tests.
    "swallowed_index": ("class S:\n    def __getitem__(self, i):\n        if i > 2: raise IndexError\n        return f(i)\nfor i, x in enumerate(S()):\n    assert x == i * i", ["def f(x): return x * x"], ["def f(x): raise IndexError", "def f(x): return x"]),
    "swallowed_attribute": ("class S:\n    @property\n    def a(self): return f(3)\nassert getattr(S(), 'a', 9) == 9 and hasattr(S(), 'a')", ["def f(x): return x * x"], ["def f(x): raise AttributeError", "def f(x): return 8"]),
    "swallowed_in_with": ("import io\nfrom contextlib import redirect_stdout\nwith redirect_stdout(io.StringIO()):\n    for got, want in zip(map(f, [1, 2]), [1, 4]):\n        assert got == want", ["def f(x): return x * x"], ["def f(x): raise StopIteration", "def f(x): return x + 9"]),
    "swallowed_then_end": ("class S:\n    @property\n    def a(self):\n        assert f(3) == 9\nhasattr(S(), 'a')", ["def f(x): return x * x"], ["def f(x): raise AttributeError"]),
    # What the tests give.
    "stdlib_given": ("import re\nfrom pathlib import Path\nfrom uuid import UUID\nfrom random import Random\nassert f(Path('a/b.txt')).name == 'b.txt' and f(re.compile('a+')).match('aab').group() == 'aa' and f(UUID(int=3)).int == 3 and f(Random(3)).random() == Random(3).random()\nassert g(slice(1, 3)) == [1, 2] and f(ValueError('x')).args == ('x',)", ["def f(x): return x\ndef g(s): return [0, 1, 2][s]"], ["def f(x): return 3\ndef g(s): return [1, 2]", "def f(x): return x\ndef g(s): return [0]"]),
    "kinds_of_plain_given": ("from enum import IntEnum\nfrom collections import namedtuple\nclass C(IntEnum):\n    A = 1\nclass L(list): pass\nP = namedtuple('P', 'x y')\nassert f(C.A) + 1 == 2 and f(P(1, 2)) == (1, 2) and sum(f(L([1, 2]))) == 3", ["def f(x): return x", "def f(x): return x if isinstance(x, int) else type(x) and x"], ["def f(x): return [x]"]),
    "any_keyword": ("assert f(self=1, what=2, f=3) == 6", ["def f(**k): return sum(k.values())"], ["def f(**k): return 5"]),
    "mocks": ("from unittest.mock import Mock\nm = Mock(return_value=9)\nassert f(m, 3) == 9\nm.assert_called_once_with(3)", ["def f(g, x): return g(x)"], ["def f(g, x): return 9", "def f(g, x): return g(g(x))"]),
    "copied": ("import copy\ns = Stack()\ns.push(1)\nt = copy.deepcopy(s)\nt.push(2)\nassert s.items == [1] and t.items == [1, 2]", [STACK], ["class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n    def __deepcopy__(self, memo): return self"]),
    # The program as a module.
    "from_solution": ("from solution import f\ndef test_f():\n    assert f(2) == 4", ["def f(x): return x * x"], ["def f(x): return 5", "def g(x): return 4"]),
    "import_solution": ("import math, solution as s\nassert math.floor(s.f(2.5)) == 6 and isinstance(s.Vector(1), s.Vector)", ["def f(x): return x * x\nclass Vector:\n    def __init__(self, x): pass"], ["def f(x): return x * x\nVector = f", "class Vector:\n    def __init__(self, x): pass"]),
    "solution_of_builtin": ("from solution import sum, max as most\nassert most(sum([1, 2]), 1) == 3", ["def sum(x): return 3\nmax = max"], ["max = max", "def sum(x): return 3", "def sum(x): return 4\nmax = max"]),
    # Changes in the program's objects.
    "cells_changed": ("b = Bag()\nb.items.append([1])\nb.items[0][0] = 5\nxs = b.items\nassert b.total() == 5\nxs.append([2])\nassert b.total() == 7\nxs.append([3])\nassert b.total() == 10 and b.copied == []\nb.copied.append(1)\nassert b.copied == []",
        ["class Bag:\n    def __init__(self): self.items = []\n    copied = property(lambda self: [])\n    def total(self): return sum(x[0] for x in self.items)"],
        ["class Bag:\n    def __init__(self): self.items, self.copied = [], []\n    def total(self): return sum(x[0] for x in self.items)", "class Bag:\n    items = property(lambda self: [[1]])\n    copied = property(lambda self: [])\n    def total(self): return 5"]),
    "in_place_operator": ("a = b = Count(1)\na += 5\nassert b.n == 6 and a is b", ["class Count:\n    def __init__(self, n): self.n = n\n    def __iadd__(self, n):\n        self.n += n\n        return self"], ["class Count:\n    def __init__(self, n): self.n = n\n    def __add__(self, n): return Count(self.n + n)", LIAR + "class Count(Y): n = 6"]),
    "own_context": ("with f('a') as x:\n    assert x == 'A'\nassert log == ['in', 'out']", ["import contextlib\nlog = []\n@contextlib.contextmanager\ndef f(x):\n    log.append('in')\n    yield x.upper()\n    log.append('out')"], ["import contextlib\nlog = ['in', 'out']\n@contextlib.contextmanager\ndef f(x):\n    yield x", "def f(x): return x"]),
    "ellipsis": ("assert f(...) is ... and f([...]) == [...]", ["def f(x): return x"], ["def f(x): return None"]),
    "pytest_main": ("import pytest, sys\n@pytest.mark.timeout(5)\n@pytest.mark.slow\ndef test_f():\n    assert f(2) == 1\nif __name__ == '__main__':\n    sys.exit(pytest.main([__file__]))", ["n = 0\ndef f(x):\n    global n\n    n += 1\n    return n"], ["def f(x): return 2"]),
    "other_main": ("import solution, unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(f(2), 4)\nsolution.main()", ["def f(x): return x * x\ndef main(): pass"], ["def f(x): return x\ndef main(): pass"]),
    # pytest's fixtures.
    "fixtures": ("import pytest\n@pytest.fixture(scope='module')\ndef two():\n    return 2\n@pytest.fixture\ndef four(two):\n    yield f(two)\nclass TestF:\n    @pytest.fixture()\n    def nine(self):\n        return 9\n    def setup_method(self, method):\n        self.x = 3\n    @pytest.mark.parametrize('a,b', [pytest.param(1, 1, id='one'), (2, 4)])\n    def test_f(self, a, b, four, nine):\n        assert f(a) == b and four == 4 and f(self.x) == nine", ["def f(x): return x * x"], ["def f(x): return x + x", "def f(x): return 4"]),
    "capsys": ("def test_f(capsys):\n    f(3)\n    out, err = capsys.readouterr()\n    assert out == '3\\n'\n    f(4)\n    assert capsys.readouterr().out.strip() == '4'", ["def f(x): print(x)"], ["def f(x): print(3)", "def f(x): return x"]),
    # The pipes.
    "forged": ("xs = [2, 1]\nassert all(map(f, [3, 4]))\nassert f(xs) == sorted(xs)", ["def f(x): return sorted(x) if isinstance(x, list) else True"], [
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"stop\", null, \"\", {}, []]\\n')\n        except OSError: pass\n    os._exit(0)",
        "import os\ndef f(x):\n    if x == 3 or x == 4: return True\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"value\", [\"list\", []], \"\", {\"0\": [\"list\", []]}, []]\\n')\n        except OSError: pass\n    os._exit(0)",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"raised\", [[[\"StopIteration\", true]], [], {}, \"\", null], \"\", {}, []]\\n')\n        except OSError: pass\n    os._exit(0)",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"raised\", [[[\"X\", false], [\"GeneratorExit\", true]], [], {}, \"\", null], \"\", {}, []]\\n')\n        except OSError: pass\n    os._exit(0)",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'\\n')\n        except OSError: pass\n    os._exit(0)",
        "import os\ndef f(x):\n    for fd in range(3, 9):\n        try: os.write(fd, b'{}\\n[]\\n')\n        except OSError: pass\n    os._exit(0)"]),
    "asked_for_more": ("def g(x):\n    return x\nxs = [1]\nassert f(g) == 9 and f(xs) == 9", ["def f(g): return 9"], ["import os\ndef f(g):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"ask\", [\"get\", [[\"yours\", 0], \"__globals__\"], {}]]\\n')\n        except OSError: pass\n    return 9", "import os\ndef f(g):\n    for fd in range(3, 9):\n        try: os.write(fd, b'[\"ask\", [\"call\", [[\"yours\", 9]], {}]]\\n')\n        except OSError: pass\n    return 9"]),
    "next_in_map": ("for got, want in zip(map(lambda n: next(f(n)), [1, 2]), [1, 2]):\n    assert got == want", ["def f(n): yield n"], ["def f(n):\n    return\n    yield", "def f(n): return iter([])"]),
    "next_ends": ("g = f(2)\ngot = []\nwhile True:\n    try:\n        got.append(next(g))\n    except StopIteration:\n        break\nassert got == [0, 1]", ["def f(n): yield from range(n)"], ["def f(n): yield 0", "def f(n): raise StopIteration"]),
    # A method's answer that acts as a number, a text or a list.
    "method_near": ("assert abs(Solution().power(2.0, 10) - 1024.0) < 1e-5", ["class Solution:\n    def power(self, x, n): return x ** n"], [LIAR + "class Solution:\n    def power(self, x, n): return Y()", LIAR + "class Solution(Y):\n    def power(self, x, n): return self", LIAR + "Solution = Y", "class Solution:\n    def power(self, x, n): return float('nan')"]),
    "method_contains": ("assert [1, 2] in Solution().permute([1, 2])", ["class Solution:\n    def permute(self, x): return [x, x[::-1]]"], [LIAR + "class Solution:\n    def permute(self, x): return Y()", "class Solution:\n    def permute(self, x): return [[2, 1]]"]),
    "method_starts": ("s = Solution()\nassert s.name('b').startswith('a') and s.name('b').islower()", ["class Solution:\n    def name(self, x): return 'a' + x"], [LIAR + "class Solution:\n    def name(self, x): return Y()", "class Solution:\n    def name(self, x): return x"]),
    "method_sorted": ("assert sorted(Solution().subsets([1])) == [[], [1]] and len(Solution().subsets([1])) == 2", ["class Solution:\n    def subsets(self, x): return [[1], []]"], [LIAR + "class Solution:\n    def subsets(self, x): return Y()"]),
    "cache": ("c = LRUCache(2)\nc.put(1, 5)\nassert c.get(1) == 5 and c.get(2) == -1 and 1 in c and len(c) == 1", ["class LRUCache:\n    def __init__(self, n): self.d = {}\n    def put(self, k, v): self.d[k] = v\n    def get(self, k): return self.d.get(k, -1)\n    def __contains__(self, k): return k in self.d\n    def __len__(self): return len(self.d)"], ["class LRUCache:\n    def __init__(self, n): self.d = {}\n    def put(self, k, v): self.d[k] = 0\n    def get(self, k): return self.d.get(k, -1)\n    def __contains__(self, k): return k in self.d\n    def __len__(self): return len(self.d)", LIAR + "LRUCache = Y"]),
    "set_up": ("import unittest\nclass T(unittest.TestCase):\n    def setUp(self):\n        self.s = Stack()\n    def test_pop(self):\n        self.s.push(3)\n        self.assertEqual(self.s.pop(), 3)\n        self.assertRaises(IndexError, self.s.pop)\n    def test_new(self):\n        self.assertEqual(len(self.s), 0)", [STACK], [STACK.replace("IndexError", "KeyError"), STACK.replace("return len(self.items)", "return 1")]),
    "counted": ("def run():\n    passed = 0\n    for x, y in [(1, 1), (2, 4)]:\n        try:\n            passed += f(x) == y\n        except Exception:\n            pass\n    return passed\nassert run() == 2", ["def f(x): return x * x"], ["def f(x): raise ValueError", LIAR + "def f(x): return Y()"]),
    "opened_up": ("def g(x):\n    return x\nassert f(g) == 77", ["def f(g): return g(77)"], ["def f(g):\n    s = g._server\n    return s.ask('get', g, '__globals__')", "def f(g): return g._server.ask('get', g, '__code__')", "def f(g): return g._server.ask('set', g, '__code__', 1)", "def f(g): return g._server.ask('getitem', g, 1)"]),
}

UNUSABLE = {
    "no_python": "assert f(",
    "nothing_asked": "def check(candidate):\n    assert candidate(2) == 4",
    "empty": "",
    "no_assertion": "f(2) == 4\nprint(f(3))",
    "only_own": "x = 3\nassert x == 3",
    "numpy": "import numpy as np\nassert np.allclose(f(2), 4)",
    "solution_module": "from solution_of_mine import f\nassert f(2) == 4",
    "async": "import asyncio\nassert asyncio.run(f(2)) == 4",
    "threads": "import threading\nthreading.Thread(target=f).start()",
    "patched": "from unittest.mock import patch\nwith patch('builtins.input', return_value='3'):\n    assert f() == 3",
    "input_replaced": "import builtins\nbuiltins.input = lambda *_: '3'\nassert f() == 3",
    "stdin_replaced": "import io, sys\nsys.stdin = io.StringIO('3')\nassert f() == 3",
    "variable_set": "import solution\nsolution.limit = 3\nassert solution.f() == 3",
    "source": "import inspect\nassert 'for' not in inspect.getsource(f)",
    "capsys_err": "def test_f(capsys):\n    f(3)\n    assert capsys.readouterr().err == '4'",
    "pytest_fixture_params": "import pytest\n@pytest.fixture(params=[1, 2])\ndef v(request): return 3\ndef test_f(v): assert f(v) == 4",
    "pytest_mark": "import pytest\n@pytest.mark.skip\ndef test_f(): assert f(3) == 4",
    "indented": "    assert f(3) == 4",
    "signature": "import inspect\nassert len(inspect.signature(f).parameters) == 1",
    "fixture": "def test_f(tmp_path):\n    assert f(tmp_path) == 1",
    "too_deep": "x = []\nfor _ in range(20000): x = [x]\nf(x)",
    "too_long": "f('x' * (17 << 20))",
    "derived": "class Mine(Base):\n    pass\nassert Mine().x == 1",
    "nested_source": "assert f(" + "(" * 500 + "1" + ")" * 500 + ") == 1",
    "nul": "assert f(1) == 1\0",
}
PROGRAMS = (
    "def f(x=0): return 4", "def f(x=0): raise StopIteration",
    "class Base:\n    x = 1\ndef f(*a): return object()",
)


def all_cases() -> Iterator[Case]:
    yield from of_tasks()
    for name, (tests, right, wrong) in WRITTEN.items():
        for i, program in enumerate(right):
            yield Case(f"written-{name}-right{i}", tests, program, "ok")
        for i, program in enumerate(wrong):
            yield Case(f"written-{name}-wrong{i}", tests, program, "error")
        for hostile in ("stop", "exit", "hard_exit", "empty"):
            if name not in ("stop_wanted_by_unittest",):
                yield Case(f"written-{name}-{hostile}", tests, HOSTILE[hostile], "error")
    for name, tests in UNUSABLE.items():
        for i, program in enumerate(PROGRAMS):
            yield Case(f"unusable-{name}-{i}", tests, program, "unusable")
