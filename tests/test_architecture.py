"""The floors of the house: imports run downwards only, and no two packages of one floor import each
other.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gearshift"


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
        assert not {"pickle", "marshal", "shelve", "joblib"} & imports(path), path
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
