"""Makes the pages of the API reference from the folders of the package, for mkdocs.yml."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gearshift"
FOLDERS = (
    "engine", "models", "algorithms", "rollouts", "rewards", "environments", "tasks", "trainers",
    "pipeline", "data", "runtime", "kernels",
)  # fmt: skip
SHOWN_FIRST = (
    "gearshift.pipeline.api",
    "gearshift.pipeline.inference",
    "gearshift.pipeline.result",
)
NOT_SHOWN = ("sandbox_child", "api", "inference", "result")
"""A program of its own that nobody imports, and modules whose functions are on the first page."""

_OUTSIDE = re.compile(r"\[[^\]]*\]\(((?:\.\./)+)([^)#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add one page for the public API and one for each folder."""
    ground = ["gearshift.types", "gearshift.batch", "gearshift.errors"]
    pages = {"gearshift": [*public(), *ground]} | {folder: modules(folder) for folder in FOLDERS}
    for name, shown in pages.items():
        title = "Public API" if name == "gearshift" else f"gearshift.{name}"
        text = "\n\n".join([f"# {title}", *(f"::: {module}" for module in shown)])
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def public() -> list[str]:
    """The functions of `import gearshift`, by the dotted names of where they are defined."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
    return [name for name in names if name.startswith(SHOWN_FIRST)]


def modules(folder: str) -> list[str]:
    """The dotted names of a folder's public modules, files before folders."""
    paths = (PACKAGE / folder).rglob("*.py")
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    shown = [p for p in parts if p[-1] != "__init__" and not set(p) & set(NOT_SHOWN)]
    return [".".join(p) for p in sorted(shown, key=lambda p: (len(p), p))]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Show a link to a file outside the site as that file's name."""
    return _OUTSIDE.sub(r"`\2`", markdown)
