"""A folder belongs to one recipe, but for what cannot change the result."""

from __future__ import annotations

from pathlib import Path

import pytest

from gearshift.errors import ConfigError, StorageError
from gearshift.pipeline.recipe import Recipe, recipe_of, record_model, record_recipe, with_date
from gearshift.runtime.config import load
from gearshift.runtime.files import write_json
from gearshift.runtime.folder_lock import lock_run_folder

BASE = [
    "model.name=tiny",
    "task.name=sentiment",
    "rl.steps=3",
    "sft.epochs=1",
    "rl.rewards=[{source: environment}]",
]


def recipe(*changes: str) -> Recipe:
    return load(Recipe, None, [*BASE, *changes])


@pytest.mark.parametrize(
    "change",
    [
        "rl.save_every=7", "rl.keep=3", "rl.trackers=[tensorboard]", "sft.save_every=0",
        "run.dir=elsewhere", "run.profile=true", "preference=null",
        "rl.rollout.overlong_prompts=drop", "sft.data.overlong=drop",
    ],
)  # fmt: skip
def test_what_cannot_change_the_result_may_change(change: str, tmp_path: Path) -> None:
    record_recipe(tmp_path, recipe())
    write_json(tmp_path / "data" / "done.json", {})
    record_recipe(tmp_path, recipe(change))
    assert load(Recipe, tmp_path / "recipe.yaml") == recipe(change), "the folder says how it is now"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("rl.steps=4", "`rl.steps` was 3 and is 4;"),
        ("eval.limit=5", "`eval.limit` was null and is 5;"),
        ("model.threads=2", "`model.threads` was null and is 2;"),
        ("rl.rewards.0.weight=0.5", "`rl.rewards.0.weight` was 1.0 and is 0.5;"),
        ("sft=null", "`sft` was {"),
    ],
)
def test_what_does_is_named(change: str, named: str, tmp_path: Path) -> None:
    record_recipe(tmp_path, recipe())
    write_json(tmp_path / "data" / "done.json", {})
    with pytest.raises(ConfigError) as caught:
        record_recipe(tmp_path, recipe(change))
    assert f"another recipe: {named}" in str(caught.value)
    assert load(Recipe, tmp_path / "recipe.yaml") == recipe()


def test_a_folder_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Keys that it does not have count as their defaults; layout and comments say nothing."""
    text = "# ours\ntask: {name: sentiment}\nrl: {rewards: [{source: environment}], steps: 3}\n"
    (tmp_path / "recipe.yaml").write_text(text + "model: {name: tiny}\nsft: {epochs: 1}\n")
    write_json(tmp_path / "data" / "done.json", {})
    record_recipe(tmp_path, with_date(recipe(), tmp_path))
    with pytest.raises(ConfigError, match=r"`rl\.rollout\.prompts` was 8 and is 9"):
        record_recipe(tmp_path, recipe("rl.rollout.prompts=9"))


def test_a_folder_in_which_nothing_was_made_may_be_another_recipes(tmp_path: Path) -> None:
    with lock_run_folder(tmp_path):
        record_recipe(tmp_path, recipe())
        (tmp_path / ".writing-0123").touch()
        (tmp_path / "data").mkdir()
        record_recipe(tmp_path, recipe("rl.steps=4"))
    assert load(Recipe, tmp_path / "recipe.yaml") == recipe("rl.steps=4")
    assert not (tmp_path / ".writing-0123").exists(), "what a killed process left is swept"


def test_a_run_without_its_recipe_is_told(tmp_path: Path) -> None:
    write_json(tmp_path / "sft" / "done.json", {})
    with pytest.raises(ConfigError, match=r"recipe\.yaml is gone; put it back"):
        record_recipe(tmp_path, recipe())


def test_the_recipe_of_a_run_that_has_begun_comes_back_from_its_record(tmp_path: Path) -> None:
    """A recipe.yaml that is torn, changed or gone: the record beside it says what was begun."""
    record_recipe(tmp_path, with_date(recipe(), tmp_path))
    write_json(tmp_path / "data" / "done.json", {})
    whole = (tmp_path / "recipe.yaml").read_text()
    other_date = whole.replace("date: '20", "date: '21")
    assert other_date != whole
    assert recipe_of(tmp_path) == with_date(recipe(), tmp_path)
    for text in ("", whole[:60], other_date, None):
        (tmp_path / "recipe.yaml").unlink()
        if text is not None:
            (tmp_path / "recipe.yaml").write_text(text)
            with pytest.raises((StorageError, ConfigError), match=r"recipe\.yaml"):
                recipe_of(tmp_path)
        record_recipe(tmp_path, with_date(recipe(), tmp_path))
        assert (tmp_path / "recipe.yaml").read_text() == whole
        with pytest.raises(ConfigError, match=r"`rl\.steps` was 3 and is 4"):
            record_recipe(tmp_path, with_date(recipe("rl.steps=4"), tmp_path))
    (tmp_path / "run.json").write_text((tmp_path / "run.json").read_text().replace("tiny", "tinx"))
    with pytest.raises(StorageError, match=r"run\.json is not as the run wrote it"):
        with_date(recipe(), tmp_path)


def test_the_model_that_a_run_begins_with_is_the_one_it_goes_on_with(tmp_path: Path) -> None:
    record_model(tmp_path, {"model.safetensors": "1:a"})  # an earlier version's run: not known
    record_recipe(tmp_path, recipe())
    record_model(tmp_path, {})  # one of the hub, not loaded yet
    for _ in range(2):
        record_model(tmp_path, {"model.safetensors": "1:a"})
    record_model(tmp_path, {})
    with pytest.raises(StorageError, match=r"another by now \(model\.safetensors changed\)"):
        record_model(tmp_path, {"model.safetensors": "1:b"})
    record_recipe(tmp_path, recipe("rl.steps=4"))  # nothing came of it: it begins anew
    record_model(tmp_path, {"model.safetensors": "1:b"})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "folder")
    for name in ("file", "file/run", "link"):
        with pytest.raises(StorageError, match=rf"{name} cannot be written \(.*\)") as caught:
            record_recipe(tmp_path / name, recipe())
        assert "\n" not in str(caught.value)
