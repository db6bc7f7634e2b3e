"""Where a policy lies that a user names by a run's folder, a stage's folder, or a model's name.

This file must not import what trains.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from gearshift.errors import ConfigError
from gearshift.models.load import holds_model
from gearshift.pipeline.recipe import POLICIES, Recipe, recipe_of


def find_policy(name: str) -> tuple[str, Recipe | None]:
    """The newest policy of a run's folder with the run's recipe; any other name as it is.

    `~` and links are followed. Raises `ConfigError` for a run without a finished policy, for a
    folder that holds neither a run nor a model, and for a run's folder that is not there.
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
    if not folder.is_dir() and _means_a_run(folder):
        names = [other.name for other in folder.parent.glob("*") if other.is_dir()]
        near = difflib.get_close_matches(folder.name, names, n=1)
        hint = f"did you mean {folder.with_name(near[0])}?" if near else "check the path."
        raise ConfigError(f"There is no folder {folder}; {hint}")
    return name, None


def _means_a_run(folder: Path) -> bool:
    """Whether a name that no folder has is a path to a run, and not a name of the hub, which would
    be asked for it, for minutes where there is no network.
    """
    beside_runs = next(folder.parent.glob("*/recipe.yaml"), None) is not None
    return len(folder.parts) > 1 and (folder.parts[0] == "runs" or beside_runs)
