"""Replaces imports of the program in the tests (`from solution import f`): the imported names
become the program's own. It knows syntax trees only.
"""

from __future__ import annotations

import ast
from collections.abc import Callable

MODULES = frozenset({
    "solution", "solutions", "submission", "program", "main", "__main__", "your_module",
})  # fmt: skip
"""Names by which tests call the program's module."""


class ReplaceImports(ast.NodeTransformer):
    """Removes imports of the program from the tests, and inserts the program's own names."""

    def __init__(self, tree: ast.Module, of_program: Callable[[ast.expr, str], ast.expr]) -> None:
        """`of_program` makes the node that replaces a name of the program."""
        self._of_program = of_program
        self._modules: set[str] = set()
        self._names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._modules |= {a.asname or a.name for a in node.names if a.name in MODULES}
            elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
                self._names |= {a.asname or a.name: a.name for a in node.names}

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        node.names = [alias for alias in node.names if alias.name not in MODULES]
        return node if node.names else ast.Pass()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.stmt:
        return ast.Pass() if node.module in MODULES else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self._modules:
            return self._of_program(node, node.attr)
        self.generic_visit(node)
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self._names or not isinstance(node.ctx, ast.Load):
            return node
        return self._of_program(node, self._names[node.id])
