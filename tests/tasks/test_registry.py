"""Tasks are found by their entry points: another package adds one, and a broken one costs itself
alone.
"""

import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path

import gymnasium
import pytest

from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe
from gearshift.runtime.config import load
from gearshift.tasks import registry
from gearshift.tasks.registry import GROUP, TASKS, get_task, load_tasks

TASK = '''
import json
from typing import Literal

from gearshift.environments.base import RowEnvironment
from gearshift.environments.registry import register
from gearshift.tasks.rows import read_rows
from gearshift.tasks.task import Task, TaskConfig


class LettersConfig(TaskConfig):
    """Words with many letters of one kind."""

    name: Literal["letters"] = "letters"
    """Which task this is."""
    letter: str = "e"
    """The letter that counts."""


def reward(prompts, completions, letter, **columns):
    return [text.count(one) / (1 + len(text)) for text, one in zip(completions, letter)]


class LettersEnvironment(RowEnvironment):
    def __init__(self, path):
        super().__init__(read_rows(path, "letter"), reward)


def prepare(config, seed, folder):
    files = {}
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        rows = [
            {"prompt": f"{split} {i}: write {config.letter}", "letter": config.letter}
            for i in range(count)
        ]
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\\n" for row in rows))
    return files


def make(config, path):
    return LettersEnvironment(path)


register("letters/Letters-v0", LettersEnvironment)
TASK = Task("letters", LettersConfig, prepare, make, metric="reward")
'''


def install(folder: Path, package: str, points: dict[str, str], **modules: str) -> None:
    """Lay out a package as pip does: its modules, and what its metadata names."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)


def points_of(folder: Path) -> list[EntryPoint]:
    found: list[Distribution] = list(distributions(path=[str(folder)]))
    return [point for each in found for point in each.entry_points]


def test_a_task_of_another_package_runs(tmp_path: Path) -> None:
    install(
        tmp_path / "site", "letters-for-gearshift", {"letters": "letters_task:TASK"},
        letters_task=TASK,
    )  # fmt: skip
    install(tmp_path / "site", "broken-one", {"broken": "no_such_module:TASK"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name: tiny, dtype: float32, device: cpu, threads: 1}\n"
        "task: {name: letters, letter: a}\n"
        "rl: {steps: 1, rollout: {prompts: 2, group_size: 2, max_new_tokens: 4}, kl: {beta: 0}}\n"
        "eval: {max_new_tokens: 4}\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])

    def gearshift(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gearshift", *words], cwd=tmp_path, timeout=300,
            env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip

    done = gearshift("run", str(recipe), f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["letter"] == "a"
    record = json.loads((tmp_path / "run" / "validation" / "rl.json").read_text())
    assert record["metric"] == "reward" and record["n"] == 4
    keys = gearshift("keys", "task[letters]").stdout
    assert "task[letters].letter: str" in keys and "The letter that counts." in keys
    failed = gearshift("run", str(recipe), "task={name: broken}")
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1
    assert "`broken` of the package broken-one cannot be loaded" in failed.stderr
    assert "no_such_module" in failed.stderr


def test_a_broken_task_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    points = {
        "letters": "letters_task_two:TASK",
        "absent": "no_such_module:TASK",
        "nameless": "letters_task_two:NOTHING",
        "wrong": "letters_task_two:reward",
        "other": "letters_task_two:TASK",
        "ends": "ends_at_once:TASK",
    }
    modules = {
        "letters_task_two": TASK.replace("letters/Letters-v0", "letters/Again-v0"),
        "ends_at_once": "raise SystemExit(3)",
    }
    install(tmp_path, "several", points, **modules)
    tasks, problems = load_tasks(points_of(tmp_path))
    assert list(tasks) == ["letters"]
    assert "letters/Again-v0" in gymnasium.registry
    for name, said in (
        ("absent", "no_such_module"),
        ("nameless", "NOTHING"),
        ("wrong", "is a function, not a gearshift Task"),
        ("other", "its Task `letters`"),
        ("ends", "SystemExit"),
    ):
        assert said in problems[name] and "package several" in problems[name]
        assert "\n" not in problems[name] and problems[name].endswith("uninstall it.")


def test_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "first", {"same": "no_such_module:TASK", "data": "no_such_module:TASK"})
    install(tmp_path, "second", {"same": "no_such_module:TASK"})
    install(tmp_path, "gearshift", {"data": "gearshift.tasks.rows:TASK"})
    tasks, problems = load_tasks(points_of(tmp_path))
    assert tasks == {"data": TASKS["data"]}  # gearshift's own stays
    assert "`same` is taken by several packages (first, second)" in problems["same"]
    assert "`data` is taken by several packages (first, gearshift)" in problems["data"]


def test_a_recipe_that_names_a_task_with_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        registry, "PROBLEMS", {"lost": "The task `lost` is lost.", "data": "Taken."}
    )
    with pytest.raises(ConfigError, match="The task `lost` is lost"):
        load(Recipe, None, ["task.name=lost"])
    with pytest.raises(ConfigError, match="The task `lost` is lost"):
        get_task("lost")
    assert "Taken" not in capsys.readouterr().err
    words = ["task={name: data, train: [{path: a.jsonl}], reward: 'a.py:f'}"]
    assert load(Recipe, None, words) == load(Recipe, None, words)
    assert capsys.readouterr().err.count("Taken. This run takes gearshift's own.") == 1


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_can_go_to_another_process(name: str) -> None:
    """`environment.processes` makes environments there."""
    assert pickle.loads(pickle.dumps(TASKS[name].make)) is TASKS[name].make
