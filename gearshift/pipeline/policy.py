"""Where a policy lies that a user names by a run's folder, a stage's folder, or a model's name.

This file must not import what trains.
"""

from __future__ import annotations

from pathlib import Path

from gearshift.errors import ConfigError
from gearshift.models.load import holds_model
from gearshift.pipeline.recipe import POLICIES, Recipe, recipe_of


def find_policy(name: str) -> tuple[str, Recipe | None]:
    """The newest policy of a run's folder with the run's recipe; any other name as it is.

    `~` and links are followed. Raises `ConfigError` for a run without a finished policy, and for a
    folder that holds neither a run nor a model.
    """
    folder = Path(name).expanduser()
    if folder.is_symlink() and not (folder / "recipe.yaml").exists():
        folder = folder.resolve()  # a stage's recipe lies beside the stage
    if (folder / "recipe.yaml").exists():
        done = [folder / stage for stage in reversed(POLICIES) if holds_model(folder / stage)]
        if not done:
            raise ConfigError(
                f"{folder} has no finished sft or rl stage to talk to yet; run it to its end first."
            )
        return str(done[0]), recipe_of(folder)
    stage = (folder.parent / "recipe.yaml").exists()
    if stage and not holds_model(folder):
        raise ConfigError(
            f"{folder} holds no finished stage; run {folder.parent} to its end first."
        )
    if stage:
        return str(folder), recipe_of(folder.parent)
    if folder.is_dir() and not holds_model(folder):
        raise ConfigError(
            f"{folder} holds neither a run nor a model; give a run's folder, such as runs/demo."
        )
    return name, None
