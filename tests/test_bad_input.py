"""A user's mistake gives one clear line that names the thing and a non-zero exit, no traceback."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from gearshift.cli.main import main
from gearshift.errors import ConfigError
from gearshift.pipeline.policy import find_policy
from gearshift.pipeline.recipe import Recipe, has_begun, record_recipe
from gearshift.runtime.config import load

RECIPE = str(Path(__file__).parent / "smoke" / "tiny.yaml")

BAD_WORDS = [
    (["run", "no_such_recipe.yaml"], "no_such_recipe.yaml"),
    (["run", RECIPE, "rl.stepz=3"], "steps"),
    (["run", RECIPE, "rl.kl.betta=3"], "beta"),
    (["run", RECIPE, "modell.name=x"], "model"),
    (["run", RECIPE, "rl.steps=many"], "rl.steps"),
    (["run", RECIPE, "rl.steps=0"], "rl.steps"),
    (["run", RECIPE, "rl.steps"], "rl.steps"),
    (["run", RECIPE, "rl.advantage=grop"], "rl.advantage"),
    (["run", RECIPE, "rl.advantage.name=grop"], "rl.advantage.name"),
    (["run", RECIPE, "rl.loss.name=ppo"], "rl.loss"),
    (["run", RECIPE, "rl.kl.estimator=k4"], "rl.kl.estimator"),
    (["run", RECIPE, "rl.update.optimizer.lr=-1"], "rl.update.optimizer.lr"),
    (["run", RECIPE, "rl.rollout.temperature=0"], "rl.rollout.temperature"),
    (["run", RECIPE, "rl.rollout.top_p=1.5"], "rl.rollout.top_p"),
    (["run", RECIPE, "model.dtype=float16"], "model.dtype"),
    (["run", RECIPE, "model.name=./no/such/folder"], "no/such/folder"),
    (["run", RECIPE, "model.device=cuda:77"], "cuda:77"),
    (["run", RECIPE, "engine.max_num_seqs=0"], "engine.max_num_seqs"),
    (["run", RECIPE, "task.name=voice_asistant"], "task"),
    (["run", RECIPE, "task.heldout_fraction=2"], "task.heldout_fraction"),
    (["run", RECIPE, "run.seed=-1"], "run.seed"),
    (["rl", RECIPE, "rl=null"], "rl"),
    (["rl", RECIPE], "sft"),
    (["run", RECIPE, "sft=null", "reward=null", "task=null"], "task.name"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: model}]"], "reward model"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: 'json:nope'}]"], "nope"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: 'nomod:f'}]"], "nomod"),
    (
        ["run", RECIPE, "sft=null", "reward=null", "rl.rollout.max_new_tokens=600"],
        "max_new_tokens=600",
    ),
    (["chat", "runs/no_such_run"], "no_such_run"),
    (["recipes", "no_such_recipe"], "no_such_recipe"),
    (["keys", "no_such_key"], "no_such_key"),
    (["keys", "task.no_such_task"], "task.no_such_task"),
    (["serve", "runs/none"], "no folder runs/none"),
    (["serve", "tiny", "--max-waiting", "0"], "--max-waiting"),
]


@pytest.mark.parametrize(("words", "named"), BAD_WORDS, ids=lambda v: str(v)[-40:])
def test_bad_words(
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    error = capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    last = error.strip().splitlines()[-1]
    assert last.startswith("gearshift: ") and named in last
    assert "Traceback" not in error


CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
BAD_ROWS = {
    "not json": ('{"messages": [', "line 1"),
    "not an object": ("[1, 2]", "line 1"),
    "no known key": ('{"question": "a", "reply": "b"}', "question"),
    "messages is text": ('{"messages": "hi"}', "messages"),
    "no role": ('{"messages": [{"content": "hi"}]}', "role"),
    "unknown role": ('{"messages": [{"role": "robot", "content": "hi"}]}', "robot"),
    "content is a number": ('{"messages": [{"role": "user", "content": 3}]}', "content"),
    "nothing to learn": ('{"messages": [{"role": "user", "content": "hi"}]}', "assistant"),
    "too long": (json.dumps({"text": "word " * 2000}), "over the 512 of the model"),
    "megabytes": (json.dumps({"text": "a" * (2 << 20)}), "line 1: it has 2,097,152 characters"),
    "nested deep": ('{"text": "a", "x": ' + "[" * 3000 + "]" * 3000 + "}", "more than 100 deep"),
    "empty file": ("", "no rows"),
    "all rows dropped": ('{"text": "  "}', "no rows left"),
    "second row broken": (json.dumps(CHAT) + "\n{oops}", "line 2"),
    "NaN": (json.dumps({"text": "a", "n": float("nan")}), "rows.jsonl, line 1 is not JSON"),
    "the fifth is too long": (
        "\n".join([*[json.dumps(CHAT)] * 4, json.dumps({"text": "word " * 2000})]),
        "rows.jsonl, line 5: it has",
    ),
    "a turn from nobody": ('{"conversations": [{"from": "x", "value": "y"}]}', "from"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, named = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main([
            "sft", RECIPE, f"run.dir={tmp_path / 'run'}", "task=null",
            f"sft.data.sources=[{{path: '{path}'}}]",
        ])  # fmt: skip
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 1
    assert error.startswith("gearshift: ") and named in error


def last_words(run: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which supervised tuning on these rows ends in an error."""
    with pytest.raises(SystemExit) as stopped:
        main([
            "sft", RECIPE, f"run.dir={run}", "task=null", f"sft.data.sources=[{{path: '{rows}'}}]",
        ])  # fmt: skip
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "done.json", "recipe.yaml", "report.html"])
def test_a_full_disk_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing fails without a name, as it does where the disk is full."""
    opened, replaced = Path.open, Path.replace

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.name == name and set(mode) & set("wax"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, mode, *args, **kwargs)

    def not_put(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replaced(self, target)

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "replace", not_put)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(CHAT))
    last = last_words(tmp_path / "run", rows, capsys)
    assert last.startswith("gearshift: ") and f"{name} cannot be written (No space left" in last


@pytest.mark.parametrize(
    ("at", "kind"),
    [("run", "file"), ("run/sft", "file"), ("run/sft/checkpoints", "link"), ("run", "link")],
)
def test_what_stands_in_a_folders_place_is_named(
    at: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, place = tmp_path / "rows.jsonl", tmp_path / at
    rows.write_text(json.dumps(CHAT))
    place.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to(tmp_path / "nowhere" / "folder")
    assert str(place) in last_words(tmp_path / "run", rows, capsys)


def test_a_stage_that_has_not_run_is_no_name_of_the_hub(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="holds no finished stage"):
        find_policy(str(tmp_path / "rl"))


def test_a_run_that_is_not_there_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no folder runs/tiny; check the path"):
        find_policy("runs/tiny")
    record_recipe(tmp_path / "mine" / "tiny", Recipe())
    with pytest.raises(ConfigError, match=r"no folder mine/tinny; did you mean mine/tiny\?"):
        find_policy("mine/tinny")
    assert find_policy("Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", None)
    assert find_policy("embedded") == ("embedded", None)


def test_links_and_home_stand_for_what_they_lead_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    stage = tmp_path / "run" / "sft"
    stage.mkdir(parents=True)
    record_recipe(stage.parent, Recipe())
    (tmp_path / "latest").symlink_to(stage)
    (tmp_path / "newest").symlink_to(stage.parent)
    (stage / "config.json").write_text("{}")
    assert find_policy("~/latest") == (str(stage), Recipe())
    assert find_policy("~/newest")[0] == str(tmp_path / "newest" / "sft")
    words = [
        "model.name=~/m", "sft.data.sources=[{path: ~/a.jsonl}]", "reward.model=~/r",
        "rl.kl.reference=~/t", "rl.value={kind: critic, init_from: ~/c}", "run.dir=~/run #2",
        "rl.rewards=[{source: 'model:~/x,~/y'}, {source: ~/f.py:g}, {source: environment}]",
    ]  # fmt: skip
    named = load(Recipe, None, words).model_dump_json()
    assert "~" not in named and named.count(str(tmp_path)) == 9


def test_a_wrong_name_of_a_model_can_be_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", RECIPE, f"run.dir={tmp_path}", "model.name=./no/such/folder"]
    with pytest.raises(SystemExit):
        main(words)
    assert "no/such/folder" in capsys.readouterr().err
    assert not has_begun(tmp_path)  # so that the same folder takes the right name


def test_the_command_alone_shows_what_it_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "talk to a run's model in the terminal" in capsys.readouterr().out
