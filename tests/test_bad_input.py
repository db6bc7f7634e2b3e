"""A user's mistake gives one clear line that names the thing and a non-zero exit, no traceback."""

import json
from pathlib import Path

import pytest

from gearshift.cli import main

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
    (["run", RECIPE, "rl.loss=ppo"], "rl.loss"),
    (["run", RECIPE, "rl.kl.estimator=k4"], "rl.kl.estimator"),
    (["run", RECIPE, "rl.optimizer.lr=-1"], "rl.optimizer.lr"),
    (["run", RECIPE, "rl.temperature=0"], "rl.temperature"),
    (["run", RECIPE, "rl.top_p=1.5"], "rl.top_p"),
    (["run", RECIPE, "model.dtype=float16"], "model.dtype"),
    (["run", RECIPE, "model.name=./no/such/folder"], "no/such/folder"),
    (["run", RECIPE, "model.device=cuda:77"], "cuda:77"),
    (["run", RECIPE, "engine.max_rows=0"], "engine.max_rows"),
    (["run", RECIPE, "task.name=voice_asistant"], "task"),
    (["run", RECIPE, "task.heldout_fraction=2"], "task.heldout_fraction"),
    (["run", RECIPE, "run.seed=-1"], "run.seed"),
    (["rl", RECIPE, "rl=null"], "rl"),
    (["rl", RECIPE], "sft"),
    (["run", RECIPE, "sft=null", "reward=null", "task=null"], "task.name"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: model}]"], "reward model"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: 'json:nope'}]"], "nope"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.rewards=[{source: 'nomod:f'}]"], "nomod"),
    (["run", RECIPE, "sft=null", "reward=null", "rl.max_new_tokens=600"], "max_new_tokens=600"),
    (["chat", "runs/no_such_run"], "no_such_run"),
    (["recipes", "no_such_recipe"], "no_such_recipe"),
    (["keys", "no_such_key"], "no_such_key"),
    (["serve", "runs/none"], "no folder runs/none"),
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
    "too long": (json.dumps({"text": "word " * 2000}), "max_length"),
    "empty file": ("", "no rows"),
    "all rows dropped": ('{"text": "  "}', "no rows left"),
    "second row broken": (json.dumps(CHAT) + "\n{oops}", "line 2"),
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
