"""What a run records of its recipe: each later start compares itself with it."""

from pathlib import Path

import pytest

from gearshift.pipeline.recipe import Recipe, record_recipe, recorded_recipe
from gearshift.pipeline.shipped import recipe_folder
from gearshift.runtime.config import identity, load

RECIPES = sorted(recipe_folder().glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_started_again(path: Path, tmp_path: Path) -> None:
    """Also one whose servers, which are no part of what is recorded, must be named."""
    recipe = load(Recipe, path)
    record_recipe(tmp_path, recipe)
    known = recorded_recipe(tmp_path)
    assert known is not None and identity(known) == identity(recipe)
    record_recipe(tmp_path, recipe)
