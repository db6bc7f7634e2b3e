"""A built wheel holds every file of the package, and the recipes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = (
    "serve/web/*.html", "serve/web/*.js", "serve/web/*.css", "tasks/*/web/panel.js",
    "kernels/cpp/*.cpp", "kernels/cpp/*.h", "pipeline/*.j2", "recipes/*.yaml", "py.typed",
)  # fmt: skip


def files(folder: str) -> set[str]:
    found = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts}


def test_a_wheel_holds_the_whole_package() -> None:
    """Hatchling leaves out what .gitignore names, also where that is a folder of the package."""
    hatchling = pytest.importorskip("hatchling.builders.wheel", reason="`make setup` installs it")
    builder = hatchling.WheelBuilder(str(ROOT))
    held = {file.distribution_path for file in builder.recurse_included_files()}
    assert held == files("gearshift") | {f"gearshift/{recipe}" for recipe in files("recipes")}
    for kind in KINDS:
        assert any(Path(path).match(f"gearshift/{kind}") for path in held), kind
    vendor = "gearshift/serve/web/vendor"
    about = (ROOT / vendor / "VENDORED.md").read_text(encoding="utf-8")
    others = re.findall(r"^\| (\S+) \| (\S+) \S+ \|", about, re.M)
    assert len(others) >= 5
    for file, package in others:
        assert {f"{vendor}/{file}", f"{vendor}/LICENSE-{package}"} <= held, package
