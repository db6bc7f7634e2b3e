"""A recipe that has no end, or that is none, is one line, in no time and no memory."""

import os
from pathlib import Path

import pytest

from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import load
from gearshift.runtime.yaml_text import MAX_BYTES

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
)
HOSTILE = {
    "in itself": ("rl: &a\n  kl: *a\n", "line 2: the alias `a` contains itself"),
    "a list in itself": ("run: &a [*a]\n", "line 1: the alias `a` contains itself"),
    "merged into itself": ("run: &a {<<: *a}\n", "the alias `a` contains itself"),
    "aliases of aliases": (LAUGHS, "holds more than 20,000 values"),
    "merges of merges": (MERGES, "holds more than 20,000 values"),
    "many values": ("rl: [" + "1," * 30_000 + "]\n", "holds more than 20,000 values"),
    "lists in lists": ("rl: " + "[" * 3000 + "]" * 3000, "nested more than 50 deep"),
    "open lists": ("rl: " + "[" * 300_000, "nested more than 50 deep"),
    "sections in sections": ("rl: " + "{a: " * 3000 + "}" * 3000, "nested more than 50 deep"),
    "a huge number": ("run:\n  seed: " + "9" * 5000, "line 2: a number has 5,000 characters"),
    "a huge hexadecimal": ("run:\n  seed: 0x" + "f" * 5000, "a number has 5,002 characters"),
    "a tag of Python": ("run: !!python/object:os.system x\n", "line 1"),
    "a wrong tag": ("run: {seed: !!timestamp x}\n", "a tag does not fit its value"),
    "NUL": ("run:\n  dir: a\0b\n", "not valid YAML"),
    "half a character": ('run: {dir: "\\ud800"}\n', "run.dir"),
    "control characters": ('"\\e[31mx\\e[0m": 1\n', r"unknown key `\\x1b\[31mx"),
    "long lines of nothing": ("# " + "x" * MAX_BYTES, "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_one_line(name: str, tmp_path: Path) -> None:
    text, what = HOSTILE[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=what) as error:
        load(Recipe, path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "override",
    [
        "rl.steps=" + "[" * 3000,
        "rl.steps=" + "9" * 5000,
        "rl.steps=[&a [*a]]",
        "a." * 5000 + "b=1",
        "x" * 100_000 + "=1",
        "task.train." + "9" * 5000 + "=1",
        "\x1b[31m=1",
    ],
    ids=lambda override: override[:12].replace("\x1b", "ESC"),
)
def test_a_hostile_override_is_one_short_line(override: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: {name: rows, train: [{path: a}]}\n")
    with pytest.raises(ConfigError) as error:
        load(Recipe, path, [override])
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="not a regular file"):
            load(Recipe, path)
    with pytest.raises(ConfigError, match="There is no file"):
        load(Recipe, tmp_path / "loop")


def test_aliases_that_end_are_as_good_as_what_they_stand_for(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "sft: &stage {epochs: 3, data: {sources: [&rows {path: a}, *rows]}}\n"
        "reward: {<<: *stage, epochs: 4}\n"
    )
    recipe = load(Recipe, path)
    assert recipe.sft and recipe.reward and len(recipe.reward.data.sources) == 2
    assert (recipe.sft.epochs, recipe.reward.epochs) == (3, 4)
