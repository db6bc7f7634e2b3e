"""Reads the text of the tests before the program answers anything: which names belong to the
program, what kinds of answers the tests expect, and whether any program could pass. So the program
cannot influence these decisions.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
from collections.abc import Iterator
from types import CodeType
from typing import NamedTuple

from gearshift.rewards.sandbox_child.name_analysis import (
    PLAIN_NAMES,
    Names,
    collect,
    name_of,
    names_in,
)
from gearshift.rewards.sandbox_child.program_imports import ReplaceImports
from gearshift.rewards.sandbox_child.rewrite import RewriteTests

HARD, SOFT = "program ", "program or "
"""Prefixes of a builtin's name where the tests mean the program's function of that name: always
with `HARD`, and with `SOFT` if the program has one.
"""
TESTS = "tests"
"""The file name in the tests' code objects."""


_CONVERT = frozenset({
    "list", "tuple", "set", "frozenset", "dict", "str", "int", "float", "complex", "bool",
    "bytes", "bytearray", "range", "iter", "repr", "type", "isinstance",
})  # fmt: skip
_CLOSED = frozenset({
    "asyncio", "concurrent", "multiprocessing", "subprocess", "socket", "threading",
})  # fmt: skip
_HIDDEN = frozenset({
    "__code__", "__globals__", "__closure__", "getsource", "getfullargspec", "signature",
})  # fmt: skip


class UnusableError(Exception):
    """No program could pass these tests."""


class TestAnalysis(NamedTuple):
    """The compiled tests, and what their text shows."""

    code: CodeType
    raises: frozenset[int]
    """The lines of the tests' own `raise` statements."""
    objects: bool
    """The tests use attributes that plain data does not have, or the program's classes or context
    managers.
    """
    operators: bool
    """The tests use the operations of plain data (`+`, `in`, `.pop()`) on objects of the program's
    classes.
    """
    prints: bool
    """The tests read what is printed."""
    nan: bool
    """The tests expect values that are not a number (NaN)."""
    watched: frozenset[str]
    """Variables of the tests that are read after a call that may have changed them."""
    functions: tuple[str, ...]
    """The functions `test...` that the tests do not call themselves."""
    imports: frozenset[str]
    """The modules that the tests import."""
    in_classes: frozenset[str]
    """The program's names inside a class body, where Python does not call `__missing__`."""


def analyze(source: str, entry_point: str = "") -> TestAnalysis:
    """Analyze the tests. Raises `UnusableError` if no program could pass them."""
    try:
        tree = ast.parse(source)
        tree = ast.fix_missing_locations(ReplaceImports(tree, _of_program).visit(tree))
        _call_check(tree, entry_point)
        nodes = list(ast.walk(tree))
        names = collect(nodes)
        _refuse(nodes, names)
        targets = dict(_targets(nodes, names, entry_point))
        functions = tuple(
            n.name
            for n in tree.body
            if isinstance(n, ast.FunctionDef) and n.name.startswith("test")
            and n.name not in names.read
        )  # fmt: skip
        found = TestAnalysis(
            raises=frozenset(n.lineno for n in nodes if isinstance(n, ast.Raise)),
            objects=any(_uses_objects(n, names) for n in nodes),
            operators=any(_uses_as_plain(n, names) for n in nodes),
            prints=re.search(r"stdout|capsys|print", source) is not None,
            nan=_expects_nan(nodes, source),
            watched=frozenset(_watched(nodes, names)),
            functions=functions,
            imports=frozenset(m for n in nodes for m in _imported(n)),
            in_classes=frozenset(
                name
                for node in nodes if isinstance(node, ast.ClassDef)
                for name in names_in(node) if names.of_program(name)
            ),
            code=_compiled(tree, targets),
        )  # fmt: skip
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnusableError(f"they are not Python: {error}") from error
    return found


def _of_program(node: ast.expr, name: str) -> ast.expr:
    """The node for a name that always means the program's function or class."""
    if not isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
        raise UnusableError("they set the program's variables")
    return ast.Name(HARD + name if hasattr(builtins, name) else name, ast.Load())


def _compiled(tree: ast.Module, targets: dict[int, str]) -> CodeType:
    """The tests as code, after their syntax tree was rewritten."""
    rewritten = ast.fix_missing_locations(RewriteTests(targets).visit(tree))
    return compile(rewritten, TESTS, "exec", dont_inherit=True)


def _call_check(tree: ast.Module, entry_point: str) -> None:
    """Call a function `check(candidate)` that nothing calls, with the entry point as its
    argument.
    """
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.args.args]
    if entry_point and "check" in defined and "check" not in names_in(tree):
        tree.body += ast.parse(f"check({entry_point})").body


def _refuse(nodes: list[ast.AST], names: Names) -> None:
    """Raises `UnusableError` for what a sandbox does not have, or what cannot cross between two of
    them.
    """
    guarded = {
        id(n)
        for t in nodes if isinstance(t, ast.Try) and t.handlers
        for s in t.body for n in ast.walk(s)
    }  # fmt: skip
    if not any(map(_asserts, nodes)):
        raise UnusableError("they assert nothing")
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in _HIDDEN:
            raise UnusableError(f"they ask for {node.attr}")
        elif "capsys" in names.bound and "err" in (name_of(node), getattr(node, "attr", "")):
            if isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
                raise UnusableError("they read standard error")
        elif _patches(node, names):
            raise UnusableError("they patch what a program uses")
        elif isinstance(node, ast.ClassDef) and any(
            map(names.of_program, map(name_of, node.bases))
        ):
            raise UnusableError("they derive a class from the program's")
        for top in _imported(node) if id(node) not in guarded else []:
            if top in _CLOSED:
                raise UnusableError(f"they use {top}, which a sandbox does not have")
            if top != "pytest" and (not top or importlib.util.find_spec(top) is None):
                raise UnusableError(f"there is no module {top!r} in the sandbox")


def _patches(node: ast.AST, names: Names) -> bool:
    """Whether this node changes a module of Python, which the program has in another process."""
    if isinstance(node, ast.Call) and "patch" in (
        name_of(node.func),
        getattr(node.func, "attr", ""),
    ):
        return getattr(node.args[0] if node.args else None, "value", None) != "sys.stdout"
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and name_of(node.value) in names.imported
        and node.attr not in ("stdout", "stderr")
    )


def _asserts(node: ast.AST) -> bool:
    """Whether the tests can fail at this node."""
    named = getattr(node, "attr", "") or name_of(node)
    return isinstance(node, (ast.Assert, ast.Raise)) or named.startswith(
        ("assert", "fail", "raises", "exit")
    )


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def _targets(nodes: list[ast.AST], names: Names, entry_point: str) -> Iterator[tuple[int, str]]:
    """The places where a builtin's name means the program's function: in an assertion that would
    not test the program otherwise, and in the arguments of a function of the tests.
    """
    hard = not any(names.of_program(n) for n in names.read)
    mark = HARD if hard else SOFT
    wanted = entry_point if hasattr(builtins, entry_point) else ""
    for node in nodes:
        if isinstance(node, ast.Assert) and names.is_clean(node.test):
            found = list(_tested(node.test, names))
        elif (asserted := _asserted(node)) and all(map(names.is_clean, asserted)):
            found = list(_tested(asserted[0], names))
        elif isinstance(node, ast.Call) and name_of(node.func) in names.defined:
            found = [n for n in node.args if isinstance(n, ast.Name) and names.builtin(n.id)]
            found = found if hard or wanted else []
        else:
            continue
        yield from ((id(n), mark) for n in found if not wanted or n.id == wanted)


def _asserted(node: ast.AST) -> list[ast.expr]:
    """The arguments of `self.assertEqual(...)` and similar calls."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.args if node.func.attr.startswith("assert") else []
    return []


def _tested(node: ast.expr, names: Names) -> Iterator[ast.Name]:
    """The builtins that an assertion is about: those whose arguments come from no other call."""
    if isinstance(node, ast.Compare):
        sides = [s for s in (node.left, *node.comparators) if list(_calls(s, names))]
        for side in sides[:1]:
            yield from _tested(side, names)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _tested(value, names)
    elif isinstance(node, ast.UnaryOp):
        yield from _tested(node.operand, names)
    elif (
        isinstance(node, ast.Call)
        and name_of(node.func) in ("all", "any")
        and isinstance(node.args[0], (ast.GeneratorExp, ast.ListComp))
    ):
        yield from _tested(node.args[0].elt, names)
    else:
        calls = list(_calls(node, names))
        calls = [c for c in calls if c.func.id not in _CONVERT] or calls[:1]  # type: ignore[attr-defined]
        for call in calls:
            if not any(other is not call and other in ast.walk(call) for other in calls):
                yield call.func  # type: ignore[misc]


def _calls(node: ast.AST, names: Names) -> Iterator[ast.Call]:
    for n in ast.walk(node):
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and names.builtin(n.func.id):
            yield n


def _uses_objects(node: ast.AST, names: Names) -> bool:
    if isinstance(node, ast.Attribute):
        of_objects = node.attr not in PLAIN_NAMES and not node.attr.startswith("__")
        return of_objects and not names.is_own(node.value)
    if isinstance(node, ast.withitem):
        return not names.is_own(node.context_expr)
    return names.is_class(name_of(node))


def _uses_as_plain(node: ast.AST, names: Names) -> bool:
    if isinstance(node, ast.BinOp):
        return names.is_instance(node.left) != names.is_instance(node.right)
    if isinstance(node, ast.AugAssign):
        return names.is_instance(node.target)
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], (ast.In, ast.NotIn)) and names.is_instance(
            node.comparators[0]
        )
    if isinstance(node, ast.Attribute):
        made = names.is_instance(node.value) or names.is_class(name_of(node.value))
        return made and node.attr in PLAIN_NAMES
    return False


def _expects_nan(nodes: list[ast.AST], source: str) -> bool:
    if re.search(r"(?i)(?<![a-z])(is_?)?nan(?![a-z])", source):
        return True
    return any(
        isinstance(n, ast.Compare)
        and isinstance(n.ops[0], ast.NotEq)
        and ast.dump(n.left) == ast.dump(n.comparators[0])
        for n in nodes
    )


def _watched(nodes: list[ast.AST], names: Names) -> Iterator[str]:
    """Variables in assertions that do not use the program directly. Such an assertion depends on
    the program only if a call of the program has changed the variable's value.
    """
    for node in nodes:
        parts = [node.test] if isinstance(node, ast.Assert) else _asserted(node)
        read = set().union(*map(_read_but_places, parts))
        if all(names.builtin(n) or n in names.imported or n in names.clean for n in read):
            yield from (n for n in read if n in names.bound)


def _read_but_places(node: ast.AST) -> set[str]:
    """The names that an expression reads, without those inside the brackets of `x[...]`."""
    places = {
        n.id for s in ast.walk(node) if isinstance(s, ast.Subscript) for n in ast.walk(s.slice)
        if isinstance(n, ast.Name)
    }  # fmt: skip
    return names_in(node) - places
