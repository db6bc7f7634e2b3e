"""The recipes for large machines fit on the cards that they name, by the plan of `--dry-run`."""

from pathlib import Path

import pytest
import torch

from benchmarks.scale_table import write_config
from gearshift.pipeline.forms import shapes
from gearshift.pipeline.machine import Machine
from gearshift.pipeline.plan import memory
from gearshift.pipeline.recipe import Recipe
from gearshift.pipeline.shipped import find_recipe
from gearshift.runtime.config import load

FIT = {"one_gpu_8b_lora": "1x1x44", "node_8b": "1x8x79", "nodes_32b_fsdp": "8x8x139",
       "node_30b_a3b_vllm": "1x4x79"}  # fmt: skip


@pytest.mark.parametrize("name", FIT)
def test_a_recipe_names_its_machine(name: str) -> None:
    text = find_recipe(name).read_text("utf-8")
    assert f"gearshift run {name} --dry-run --on {FIT[name]}" in text
    load(Recipe, find_recipe(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIT)
def test_a_recipe_fits_on_the_cards_that_it_names(name: str, tmp_path: Path) -> None:
    """It needs no weights: the model's public config is enough."""
    recipe = load(Recipe, find_recipe(name))
    folder = write_config(recipe.model.name, tmp_path / "model")
    recipe = load(Recipe, find_recipe(name), [f"model.name={folder}"])
    machine = Machine.named(FIT[name], recipe.scale)
    [parts] = memory(recipe, shapes(recipe.model), torch.bfloat16, machine).values()
    assert 0.3 * machine.free < parts["total"] <= machine.free, parts
    assert not any("not measured" in part for part in parts)
