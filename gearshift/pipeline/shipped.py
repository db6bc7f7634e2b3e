"""The recipes that ship with Gearshift."""

from __future__ import annotations

from pathlib import Path


def recipe_folder() -> Path:
    """Where the recipes shipped with gearshift lie: in the package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def find_recipe(name: str) -> Path:
    """A path as it is; a bare name is searched for among the shipped recipes. `load` reports a file
    that is missing.
    """
    path = Path(name).expanduser()
    shipped = recipe_folder() / f"{path.stem}.yaml"
    return shipped if not path.exists() and path.name == name and shipped.exists() else path
