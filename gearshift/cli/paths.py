"""Turns a word of the command line into a run's folder."""

from __future__ import annotations

from pathlib import Path


def resolve_folder(name: str) -> str:
    """A run's folder or a model's as the user names it, with `~` and links followed: a stage's
    recipe lies in the folder that the stage lies in.
    """
    folder = Path(name).expanduser()
    linked = folder.is_symlink() and not (folder / "recipe.yaml").exists()
    return str(folder.resolve() if linked else folder)
