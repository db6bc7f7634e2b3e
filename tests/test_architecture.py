"""Imports run downwards only, and no two packages of one layer import each other."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gearshift"
CORE_OF_TASKS = ("registry", "task", "rows", "gym")


def imports(path: Path) -> set[str]:
    """Dotted names of the gearshift modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_import_linter_keeps_the_floors() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_algorithms_know_tensors_and_nothing_else() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        known = (
            "__future__",
            "collections",
            "dataclasses",
            "typing",
            "math",
            "torch",
            "gearshift.algorithms",
        )
        for name in imports(path):
            assert name.startswith(known), f"{path.name} imports {name}"
            assert not name.startswith("torch.distributed"), path.name


def test_nothing_is_unpickled() -> None:
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        # The ranks of one run send each other objects, and open no file by it.
        known = {"pickle"} if path.name == "distributed.py" else set()
        assert {"pickle", "marshal", "shelve", "joblib"} & imports(path) <= known, path
        assert "torch.load" not in text and "torch.save" not in text, path


def test_no_forward_is_reassigned() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ".forward =" not in path.read_text(encoding="utf-8"), path


def test_what_the_makefile_imports_is_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r"from (gearshift[\w.]*) import (\w+)", text)
    assert found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name)


def floors() -> dict[str, int]:
    """Each package's place from the top, as import-linter has it."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    return {name.strip(): i for i, layer in enumerate(layers) for name in layer.split("|")}


def test_no_string_names_a_module_of_a_higher_floor() -> None:
    """An import that is made from a string runs downwards, too."""
    floor = floors()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own not in floor:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if "\n" in node.value or " " in node.value:
                    continue  # prose
                for name in re.findall(r"\bgearshift\.(\w+)", node.value):
                    assert floor.get(name, 99) >= floor[own], f"{path}: {node.value!r}"


def test_commands_and_servers_name_no_task() -> None:
    tasks = {"voice_assistant", "customer_service", "customer_replies", "tau2", "translation"}
    tasks |= {"reasoning", "sentiment"}
    for folder in ("cli", "serve", "pipeline"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert not tasks & set(re.findall(r"\w+", path.read_text(encoding="utf-8"))), path
            known = {name for name in imports(path) if name.startswith("gearshift.tasks")}
            assert known <= {f"gearshift.tasks.{core}" for core in CORE_OF_TASKS}, path
