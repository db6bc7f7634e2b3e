"""Finds the names that the tests bind, and the values that come only from the tests. It knows
syntax trees only.
"""

from __future__ import annotations

import ast
import builtins
import re

_PLAIN = (int, float, complex, str, bytearray, list, tuple, dict, set, range, Exception)
PLAIN_NAMES = frozenset(name for kind in _PLAIN for name in dir(kind)) | frozenset({
    "most_common", "elements", "subtract", "total", "move_to_end", "appendleft", "popleft",
    "extendleft", "rotate", "maxlen", "default_factory", "year", "month", "day", "hour",
    "minute", "second", "microsecond", "days", "seconds", "total_seconds", "isoformat",
    "strftime", "weekday", "date", "time", "quantize", "exception", "msg", "code", "errno",
    "value",
})  # fmt: skip
"""Attributes of plain data."""
_CLASS = r"_*[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*"
"""The usual form of a class's name."""
_ANYTHING = frozenset({"eval", "exec", "globals", "locals", "vars"})
"""Builtins that can reach any name."""


class Names:
    """The names that the tests bind, and the expressions to which they are bound; None stands for
    any value.
    """

    def __init__(self, read: set[str]) -> None:
        self.read = read
        self.bound: dict[str, list[ast.expr | None]] = {}
        self.imported: set[str] = set()
        self.caught: set[str] = set()
        self.defined: set[str] = set()
        self.clean: set[str] = set()
        """Names whose value comes only from the tests."""
        self.own: set[str] = set()
        """Names of objects that the tests or the standard library made."""
        self.instances: set[str] = set()
        """Names of objects that the tests make from the program's classes."""

    def free(self, name: str) -> bool:
        """Whether the tests do not bind this name."""
        return name not in self.bound and name not in self.imported and name not in self.caught

    def builtin(self, name: str) -> bool:
        return self.free(name) and hasattr(builtins, name)

    def of_program(self, name: str) -> bool:
        return bool(name) and self.free(name) and not (
            hasattr(builtins, name) or name.startswith("__")
        )  # fmt: skip

    def is_clean(self, node: ast.AST) -> bool:
        """Whether all names in this node come only from the tests."""
        return all(map(self._from_tests, names_in(node)))

    def _from_tests(self, name: str) -> bool:
        own = name in self.imported or name in self.clean or self.builtin(name)
        return own and name not in _ANYTHING

    def is_own(self, node: ast.expr) -> bool:
        """Whether this attribute, call or item belongs to an object of the tests or of the standard
        library.
        """
        while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript, ast.Await)):
            node = node.func if isinstance(node, ast.Call) else node.value
        if not isinstance(node, ast.Name):
            return self.is_clean(node)
        own = self.own | self.imported | self.caught | {"self", "cls", "capsys"}
        return node.id in own or self.builtin(node.id)

    def is_class(self, name: str) -> bool:
        """Whether this name must be a class of the program."""
        return self.of_program(name) and re.fullmatch(_CLASS, name) is not None

    def is_instance(self, node: ast.AST | None) -> bool:
        """Whether this object is made by a call of one of the program's classes."""
        if isinstance(node, ast.Call):
            return self.is_class(name_of(node.func))
        if isinstance(node, (ast.Tuple, ast.List)):
            return any(map(self.is_instance, node.elts))
        if isinstance(node, ast.BinOp):
            return self.is_instance(node.left) or self.is_instance(node.right)
        if isinstance(node, (ast.Subscript, ast.UnaryOp)):
            return self.is_instance(node.value if isinstance(node, ast.Subscript) else node.operand)
        name = name_of(node) if isinstance(node, ast.Name) else _own_attribute(node)
        return name in self.instances


def _own_attribute(node: ast.AST | None) -> str:
    """`self.x` as a text; empty for any other node."""
    if isinstance(node, ast.Attribute) and name_of(node.value) == "self":
        return f"self.{node.attr}"
    return ""


def names_in(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def name_of(node: ast.AST) -> str:
    """The name that this node is; empty for any other node."""
    return node.id if isinstance(node, ast.Name) else ""


def collect(nodes: list[ast.AST]) -> Names:
    """The names of the tests."""
    names = Names(read=set(map(name_of, nodes)))

    def bind(target: ast.AST, value: ast.expr | None) -> None:
        for node in ast.walk(target):
            name = name_of(node) or _own_attribute(node)
            if name and isinstance(node.ctx, ast.Store):  # type: ignore[attr-defined]
                names.bound.setdefault(name, []).append(value)

    for node in nodes:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                bind(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
            bind(node.target, node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            bind(node.target, node.iter)
        elif isinstance(node, ast.withitem) and node.optional_vars:
            bind(node.optional_vars, node.context_expr)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.defined.add(node.name)
            names.bound.setdefault(node.name, []).append(None)
        elif isinstance(node, ast.arg):
            names.bound.setdefault(node.arg, []).append(None)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.caught.add(node.name)
        elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
            names.bound.setdefault(node.name, []).append(None)
    _settle(names)
    return names


def _settle(names: Names) -> None:
    """Remove from `clean` and `own` the names whose values come from the program, until nothing
    changes.
    """
    names.clean, names.own = set(names.bound), set(names.bound)
    while True:
        clean, own = names.clean, names.own
        names.clean = {n for n in clean if all(v and names.is_clean(v) for v in names.bound[n])}
        names.own = {n for n in own if all(v and names.is_own(v) for v in names.bound[n])}
        if (clean, own) == (names.clean, names.own):
            break
    known = -1
    while known < (known := len(names.instances)):
        names.instances |= {
            n for n, values in names.bound.items() if any(map(names.is_instance, values))
        }
