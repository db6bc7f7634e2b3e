"""A dry run finds what can be found without training, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gearshift.cli.main import main
from gearshift.errors import GearshiftError
from gearshift.pipeline.check import check_recipe
from gearshift.pipeline.recipe import STAGES, Recipe
from gearshift.pipeline.run import Run
from gearshift.runtime.config import load

DATA = "task={name: data, train: [{path: rows.jsonl}], reward: 'rewards.py:good'}"
RL = [DATA, "rl.steps=1"]


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    Path("rewards.py").write_text("def good(completions, **columns):\n    return [1.0]\n")


FAULTS = [
    (["sft.data.sources=[{path: row.jsonl}]"], "row.jsonl does not exist; did you mean rows.jsonl"),
    (["sft.data.sources=[{path: broken.jsonl}]"], "broken.jsonl, line 2 is not JSON"),
    (["sft.data.sources=[{path: rows.jsonl, split: test}]"], "has no split 'test'"),
    (["sft.data.sources=[{path: 'task:labelled'}]"], "task:labelled is a task's file; set task.n"),
    (["sft.epochs=1"], "sft has no data; name some under sft.data.sources"),
    (["reward.data.sources=[{path: pairs.jsonl}]"], "pairs.jsonl, line 1"),
    (
        ["reward.data.sources=[{path: pairs.jsonl}]", "reward.heldout.sources=[{path: p.csv}]"],
        "pairs.jsonl, line 1",
    ),
    (["rl.steps=1"], "rl needs a task; set task.name"),
    ([*RL, "rl.rewards=[{source: 'no.py:good'}]"], "There is no reward file no.py"),
    ([*RL, "rl.rewards=[{source: 'rewards.py:god'}]"], "rewards.py has no function `go"),
    ([*RL, "task.reward=rewards.py:goood"], "rewards.py has no function `go"),
    ([*RL, "task.train=[{path: row.jsonl}]"], "row.jsonl does not exist"),
    ([*RL, "task.validation=held.jsonl"], "held.jsonl does not exist"),
    (["task={name: gym, id: games.py:Game}", "rl.steps=1"], "games.py"),
]


@pytest.mark.parametrize(("words", "said"), FAULTS, ids=str)
def test_a_fault_is_found_before_anything_is_trained(words: list[str], said: str) -> None:
    with pytest.raises(GearshiftError) as found:
        check_recipe(load(Recipe, None, words), STAGES)
    assert said in str(found.value) and "\n" not in str(found.value)


def test_what_is_right_or_not_asked_for_passes() -> None:
    words = [*RL, "sft.data.sources=[{path: broken.jsonl}]", "reward.data.sources=[{path: o/n}]"]
    check_recipe(load(Recipe, None, words), ["rl", "reward"])


def test_a_dry_run_looks(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text("model: {name: tiny}\n")
    with pytest.raises(SystemExit):
        main(["run", "recipe.yaml", "--dry-run", *RL, "task.reward=rewards.py:goood"])
    shown = capsys.readouterr()
    assert "rewards.py has no function `go" in shown.err and "# Plan" not in shown.out
    main(["run", "recipe.yaml", "--dry-run", *RL])
    assert "# Plan" in capsys.readouterr().out


def test_a_run_ends_before_its_first_stage(tmp_path: Path) -> None:
    base = ["model={name: tiny, device: cpu}", *RL, "sft.data.sources=[{path: rows.jsonl}]"]
    wanted = load(Recipe, None, [*base, "rl.rewards=[{source: 'rewards.py:god'}]"])
    with pytest.raises(GearshiftError, match="no function `god`"):
        Run(wanted).execute()
    assert not (Path(wanted.run.dir) / "sft").exists()
