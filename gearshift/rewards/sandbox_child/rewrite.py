"""Rewrites the tests' syntax tree where Python's own meaning fails across two processes.

It knows syntax trees only.
"""

from __future__ import annotations

import ast

from gearshift.rewards.sandbox_child.name_analysis import name_of

COMPARE, TYPE, STOP, NEXT, SEEN = " compare", " type", " stop", " next", " seen"
"""Names that the rewritten tests use, and that no program can define."""
_ORDER = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)


class RewriteTests(ast.NodeTransformer):
    """Replaces comparisons of order, `type(x)`, `StopIteration`, and the builtins that the program
    defines.
    """

    def __init__(self, targets: dict[int, str]) -> None:
        self._targets = targets

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if id(node) in self._targets:
            return ast.Name(self._targets[id(node)] + node.id, node.ctx)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        if node.attr == "__class__" and isinstance(node.ctx, ast.Load):
            return ast.Call(ast.Name(TYPE, ast.Load()), [node.value], [])
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if not any(isinstance(op, _ORDER) for op in node.ops):
            return node
        ops: list[ast.expr] = [ast.Constant(type(op).__name__) for op in node.ops]
        args = [node.left, ast.Tuple(ops, ast.Load()), *node.comparators]
        return ast.Call(ast.Name(COMPARE, ast.Load()), args, [])

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        node.args = [_or_stop(arg) for arg in node.args]
        if name_of(node.func) in ("type", "next") and len(node.args) == 1:
            node.func = ast.Name(TYPE if name_of(node.func) == "type" else NEXT, ast.Load())
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.ExceptHandler:
        self.generic_visit(node)
        if isinstance(node.type, ast.Tuple):
            if any(name_of(n) == "StopIteration" for n in node.type.elts):
                node.type.elts.append(ast.Name(STOP, ast.Load()))
        elif node.type:
            node.type = _or_stop(node.type)
        node.body.insert(0, _seen())
        return node

    def visit_With(self, node: ast.With) -> list[ast.stmt]:
        self.generic_visit(node)
        return [node, _seen()]

    def visit_Expr(self, node: ast.Expr) -> list[ast.stmt]:
        self.generic_visit(node)
        named = getattr(getattr(node.value, "func", None), "attr", "")
        return [node, _seen()] if named.startswith(("assertRaises", "raises")) else [node]


def _seen() -> ast.Expr:
    """The statement that records that an exception was caught."""
    return ast.Expr(ast.Call(ast.Name(SEEN, ast.Load()), [], []))


def _or_stop(node: ast.expr) -> ast.expr:
    """`StopIteration` in an `except`; the program's `StopIteration` has a class of its own."""
    if name_of(node) != "StopIteration":
        return node
    return ast.Tuple([node, ast.Name(STOP, ast.Load())], ast.Load())
