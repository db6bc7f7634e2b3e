"""The user's own rows and reward: what reaches the function, what is held out, and how faults are
told.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.tasks import rows as t

REWARDS = """
calls = []
def exact(prompts, completions, answer, **columns):
    calls.append(columns)
    return [float(c.strip() == a) for c, a in zip(completions, answer)]
def by_length(prompts, completions, **columns):
    return [len(c) / 10 for c in completions]
"""


@pytest.fixture
def rewards(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return f"{tmp_path / 'rewards.py'}:exact"


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 1 = ?", "answer": str(i + 1), **more} for i in range(count)]


def config(path: str, reward: str, **keys: Any) -> t.RowsConfig:
    return t.RowsConfig(**{"train": [{"path": path}], "reward": reward, **keys})


def load(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_columns_reach_the_reward_and_success_has_a_threshold(tmp_path: Path, rewards: str) -> None:
    source = write(tmp_path / "rows.jsonl", sums(20, level="easy"))
    paths = t.prepare(config(source, rewards, system="Add."), 0, tmp_path / "data")
    assert sorted(paths) == ["heldout", "train"]  # no row has an answer to learn from
    env = t.RowsEnvironment(paths["heldout"], rewards)
    check_env(env, skip_render_check=True)
    _, info = env.reset(options={"row": 0})
    assert [m["role"] for m in info["messages"]] == ["system", "user"]
    right = env.rows[0]["answer"]
    _, reward, done, _, info = env.step(f"{right}\n")
    assert (reward, done, info["success"], info["gold"]) == (1.0, True, True, right)
    assert env.score.__globals__["calls"][-1]["level"] == ["easy"]  # type: ignore[attr-defined]
    env.reset(options={"row": 0})
    assert env.step("no")[4]["success"] is False
    length = rewards.replace("exact", "by_length")
    for threshold, said in ((0.3, True), (0.5, False), (None, None)):
        env = t.RowsEnvironment(paths["heldout"], length, threshold)
        env.reset(options={"row": 0})
        assert env.step("four")[4].get("success") is said


def test_held_out_prompts_are_never_trained_on(tmp_path: Path, rewards: str) -> None:
    # Every prompt twice with other columns: a split by rows would leak.
    source = write(tmp_path / "rows.jsonl", sums(30, n=1) + sums(30, n=2))
    paths = t.prepare(config(source, rewards, heldout=0.3), 5, tmp_path / "a")
    train, heldout = load(paths["train"]), load(paths["heldout"])
    asked = {row["prompt"][-1]["content"] for row in train}
    assert len(heldout) == 9 and len(train) == 42
    assert not asked & {row["prompt"][-1]["content"] for row in heldout}
    again = t.prepare(config(source, rewards, heldout=0.3), 5, tmp_path / "b")
    assert all(paths[n].read_bytes() == again[n].read_bytes() for n in paths)
    # A file of its own: what it holds leaves the training rows.
    other = write(tmp_path / "test.jsonl", sums(10))
    paths = t.prepare(config(source, rewards, heldout=other), 5, tmp_path / "c")
    assert len(load(paths["heldout"])) == 10 and len(load(paths["train"])) == 40
    with pytest.raises(DataError, match=r"every prompt of task.train is held out"):
        t.prepare(config(other, rewards, heldout=source), 5, tmp_path / "d")


def test_rows_with_answers_are_labelled(tmp_path: Path, rewards: str) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    source = write(
        tmp_path / "rows.jsonl",
        [
            *sums(10),
            {"prompt": "7 + 7 = ?", "completion": "14", "answer": "14"},
            {"messages": chat, "answer": "hello"},
            {"prompt": "99 + 1 = ?", "answer": "100"},
        ],
    )
    other = write(tmp_path / "test.jsonl", [{"prompt": "new", "answer": ""}])
    paths = t.prepare(config(source, rewards, heldout=other, system="S"), 0, tmp_path / "data")
    system = {"role": "system", "content": "S"}
    seven = [
        {"role": "user", "content": "7 + 7 = ?"},
        {"role": "assistant", "content": "14"},
    ]
    assert load(paths["labelled"]) == [
        {"messages": [system, *seven]},
        {"messages": [system, *chat]},
    ]
    train = load(paths["train"])
    assert len(train) == 13 and train[11]["prompt"] == [system, chat[0]]


def test_sources_are_mixed_by_weight(tmp_path: Path, rewards: str) -> None:
    one = write(tmp_path / "one.jsonl", sums(6))
    two = str(tmp_path / "two.csv")
    with open(two, "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], ["1 + 1?", "2"], ["2 + 2?", "4"]])
    other = write(tmp_path / "test.jsonl", [{"prompt": "new", "answer": ""}])
    mixed = config(one, rewards, heldout=other)
    mixed = t.RowsConfig(
        **{**mixed.model_dump(), "train": [{"path": one}, {"path": two, "weight": 3}]}
    )
    rows = load(t.prepare(mixed, 0, tmp_path / "data")["train"])
    assert len(rows) == 6 + 3 * 2


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([*sums(2), {"question": "x"}], r"line 3: the keys are question; accepted are: prompt"),
        ([*sums(2), {"prompt": 3}], r"line 3: `prompt` is 3; it must be"),
        ([*sums(1), {"prompt": [{"role": "user"}]}], r"line 2: a message in `prompt`"),
        ([*sums(1), {"prompt": "x", "completion": 4}], r"line 2: `completion` is 4"),
        ([*sums(1), 5], r"line 2 is not an object"),
    ],
)
def test_a_broken_row_is_named(rows: list[Any], match: str, tmp_path: Path, rewards: str) -> None:
    source = write(tmp_path / "rows.jsonl", rows)
    other = write(tmp_path / "test.jsonl", [{"prompt": "new", "answer": ""}])
    with pytest.raises(DataError, match=match):
        t.prepare(config(source, rewards, heldout=other), 0, tmp_path / "data")


def test_faults_of_the_recipe_are_one_line(tmp_path: Path, rewards: str) -> None:
    source = write(tmp_path / "rows.jsonl", sums(5))
    with pytest.raises(DataError, match=r"did you mean .*rows\.jsonl"):
        t.prepare(config(str(tmp_path / "row.jsonl"), rewards), 0, tmp_path / "data")
    with pytest.raises(ConfigError, match="no function `exakt`"):
        t.prepare(config(source, rewards.replace("exact", "exakt")), 0, tmp_path / "data")
    with pytest.raises(ConfigError, match=r"a share between 0 and 1, or a file"):
        t.prepare(config(source, rewards, heldout=1.5), 0, tmp_path / "data")
    with pytest.raises(DataError, match=r"no file .*prepare"):
        t.RowsEnvironment(tmp_path / "none.jsonl", rewards)
    assert not (tmp_path / "data").exists()
