"""What a type checker reads in the package: the public names have types, and every key of a recipe
is read somewhere.
"""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mypy.build import BuildResult, build
from mypy.find_sources import create_source_list
from mypy.modulefinder import BuildSource
from mypy.nodes import MemberExpr, NameExpr, TypeInfo
from mypy.options import Options
from mypy.types import AnyType, Instance, Type, TypeType, TypeVarType, UnionType, get_proper_type

import gearshift
from gearshift.algorithms.advantages import ADVANTAGES
from gearshift.algorithms.policy_losses import POLICY_LOSSES
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import Config
from gearshift.runtime.keys import models_of
from gearshift.trainers.rl.methods import AdvantageBase, LossBase

ROOT = Path(__file__).parent.parent
USER = "user"
PUBLIC = sorted(set(gearshift.__all__) - {"__version__"})
PROGRAM = "from gearshift import *\nimport gearshift\n" + "".join(
    f"(gearshift.{name}, {name})\n" for name in PUBLIC
)


@cache
def checked(program: str = PROGRAM) -> BuildResult:
    """mypy's result for the package and a user's program, without the libraries' own types."""
    options = Options()
    options.incremental, options.export_types, options.preserve_asts = False, True, True
    options.follow_imports, options.ignore_missing_imports = "skip", True
    options.implicit_reexport = False  # as `strict` has it
    sources = create_source_list([str(ROOT / "gearshift")], options)
    return build([*sources, BuildSource("user.py", USER, program)], options)


def classes(kind: Type) -> Iterator[TypeInfo]:
    """The classes that a value of this type may have."""
    kind = get_proper_type(kind)
    if isinstance(kind, UnionType):
        for item in kind.items:
            yield from classes(item)
    elif isinstance(kind, TypeType):
        yield from classes(kind.item)
    elif isinstance(kind, TypeVarType):
        yield from classes(kind.upper_bound)
    elif isinstance(kind, Instance):
        yield kind.type


@cache
def reads() -> Counter[tuple[str, str]]:
    """How often the package reads each attribute, by the class that defines it."""
    found: Counter[tuple[str, str]] = Counter()
    kinds = checked().types
    for node in kinds:
        if isinstance(node, MemberExpr) and node.expr in kinds:
            for one in classes(kinds[node.expr]):
                owner = next((base for base in one.mro if node.name in base.names), None)
                found[owner.fullname if owner else "", node.name] += 1
    return found


def reads_of(config: type[Config], key: str) -> int:
    """How often a key is read, other than by the class's own checks."""
    bases = [base for base in config.__mro__ if issubclass(base, Config)]
    names = [f"{base.__module__}.{base.__qualname__}" for base in bases]
    tree = ast.parse(textwrap.dedent(inspect.getsource(config)))
    checks = [
        node
        for check in ast.walk(tree)
        if isinstance(check, ast.FunctionDef)
        if any("validator" in ast.unparse(decorator) for decorator in check.decorator_list)
        for node in ast.walk(check)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{key}"
    ]
    return sum(reads()[name, key] for name in names) - len(checks)


def sections(config: type[Any]) -> Iterator[type[Config]]:
    """A section of a recipe, and the sections in it."""
    yield config
    for field in config.model_fields.values():
        for inner in models_of(field.annotation):
            yield from sections(inner)


SECTIONS = list(dict.fromkeys(
    section
    for name, field in Recipe.model_fields.items() if name != "task"  # a task reads its own keys
    for outer in models_of(field.annotation)
    for section in sections(outer)
))  # fmt: skip


def test_every_public_name_has_a_type() -> None:
    """Also by `from gearshift import *`, although the package imports a name at its first use."""
    result = checked()
    assert not [error for error in result.errors if error.startswith("user.py")]
    known = {
        (node.line, type(node), node.name)
        for node, kind in result.types.items()
        if isinstance(node, NameExpr | MemberExpr)
        if node.fullname.startswith("gearshift.") and not isinstance(get_proper_type(kind), AnyType)
    }
    lines = list(enumerate(PUBLIC, start=3))
    assert known >= {(line, form, n) for line, n in lines for form in (NameExpr, MemberExpr)}


def test_the_names_that_type_checkers_import_are_the_public_ones() -> None:
    tree = ast.parse(Path(gearshift.__file__).read_text(encoding="utf-8"))
    [block] = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    imported = [alias for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names]
    assert [alias.name for alias in imported] == [alias.asname for alias in imported]
    assert sorted(alias.name for alias in imported) == PUBLIC


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_read(section: type[Config]) -> None:
    passed = set()
    if issubclass(section, AdvantageBase | LossBase):  # further keys are arguments of a function
        functions = ADVANTAGES if issubclass(section, AdvantageBase) else POLICY_LOSSES
        names = section.model_fields["name"].annotation.__args__
        passed = set.intersection(*(set(inspect.signature(functions[n]).parameters) for n in names))
    unread = [
        key for key in section.model_fields if not reads_of(section, key) and key not in passed
    ]
    assert not unread
