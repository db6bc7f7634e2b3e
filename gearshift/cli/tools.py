"""The commands around a run: `recipes`, `keys` and `parity`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gearshift.errors import ConfigError, DataError
from gearshift.pipeline.shipped import recipe_folder
from gearshift.runtime.terminal import echo


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    recipes_command = commands.add_parser(
        "recipes",
        help="list the recipes that ship with gearshift, or copy one; `slurm` is a batch script",
        description="List the recipes that ship with gearshift, or copy one. `slurm` is a batch "
        "script that runs any recipe on several machines.",
    )
    recipes_command.add_argument(
        "name", nargs="?", help="the recipe to copy; without it, all are listed"
    )
    recipes_command.add_argument(
        "to", nargs="?", default=".", help="the folder or file to copy it to"
    )
    recipes_command.set_defaults(do=recipes)
    keys_command = commands.add_parser(
        "keys",
        help="print the keys of a recipe: type, default, meaning",
        description="Print the keys of a recipe: type, default, meaning.",
    )
    keys_command.add_argument(
        "prefix",
        nargs="?",
        default="",
        help="only keys that start with this: rl.kl, task.gym",
    )
    keys_command.set_defaults(do=keys)
    parity_command = commands.add_parser(
        "parity",
        help="compare how both gears and Hugging Face compute a model",
        description="Print the gaps between the two gears and Hugging Face's own forward, for one "
        "turn and for two, and of each layer where they are large. Over the bound the exit code is "
        "1.",
    )
    parity_command.add_argument(
        "model", help="a run's folder, a stage's folder, or any model (a folder or a name)"
    )
    parity_command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="the precision; auto",
    )
    parity_command.add_argument("--device", default="auto", help="the device; auto")
    parity_command.add_argument(
        "--json", action="store_true", help="print JSON in place of a table"
    )
    parity_command.set_defaults(do=parity)


def recipes(arguments: argparse.Namespace) -> None:
    """List the shipped recipes, or copy one."""
    from gearshift.runtime.files import write_text

    available = {
        path.stem: path
        for path in sorted(recipe_folder().iterdir())
        if path.suffix in (".yaml", ".sh")
    }
    if arguments.name is None:
        for name, path in available.items():
            lines = path.read_text(encoding="utf-8").splitlines()
            first = next(line for line in lines if not line.startswith("#!"))
            echo(f"{name:32} {first.removeprefix('#').strip()}")
        return
    source = available.get(Path(arguments.name).stem)
    if source is None:
        raise ConfigError(
            f"There is no recipe {arguments.name!r}; there are: {', '.join(available)}."
        )
    target = Path(arguments.to).expanduser()
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise DataError(f"{target} exists already; name another file.")
    if not target.parent.is_dir():
        raise DataError(f"The folder {target.parent} does not exist; make it first.")
    write_text(target, source.read_text(encoding="utf-8"))
    echo(str(target))


def keys(arguments: argparse.Namespace) -> None:
    """Print every key of a recipe."""
    from gearshift.pipeline.recipe import Recipe
    from gearshift.runtime.keys import describe_keys

    lines = describe_keys(Recipe, arguments.prefix)
    if not lines:
        raise ConfigError(
            f"No key starts with {arguments.prefix!r}; `gearshift keys` lists them all."
        )
    echo("\n".join(lines))


def parity(arguments: argparse.Namespace) -> None:
    """Print how far both gears are from each other and from Hugging Face's forward."""
    import json

    from gearshift.models.load import ModelConfig
    from gearshift.pipeline.parity import parity
    from gearshift.pipeline.policy import find_policy

    name, recipe = find_policy(arguments.model)
    config = recipe.model if recipe else ModelConfig()
    update = {"dtype": arguments.dtype, "device": arguments.device}
    measured = parity(config.model_copy(update=update), name)
    echo(json.dumps(measured.record(), indent=1) if arguments.json else measured.table())
    if not measured.ok:
        sys.exit(1)
