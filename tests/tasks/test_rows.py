"""The user's own rows and reward: what reaches the function, what is held out, and which errors
faults give.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from gearshift.errors import ConfigError, DataError
from gearshift.tasks import rows as t

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
    assert sorted(paths) == ["test", "train", "validation"]  # no row has an answer to learn from
    env = t.RowsEnvironment(paths["validation"], rewards)
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
        env = t.RowsEnvironment(paths["validation"], length, threshold)
        env.reset(options={"row": 0})
        assert env.step("four")[4].get("success") is said


def asked(path: Path) -> set[str]:
    return {row["prompt"][-1]["content"] for row in load(path)}


def test_no_prompt_stands_in_two_splits(tmp_path: Path, rewards: str) -> None:
    # Every prompt twice with other columns: a split by rows would leak.
    source = write(tmp_path / "rows.jsonl", sums(30, n=1) + sums(30, n=2))
    paths = t.prepare(config(source, rewards, validation=0.3, test=0.2), 5, tmp_path / "a")
    rows = {name: load(path) for name, path in paths.items()}
    assert {n: len(r) for n, r in rows.items()} == {"validation": 18, "test": 12, "train": 30}
    assert len(set.union(*map(asked, paths.values()))) == 30
    again = t.prepare(config(source, rewards, validation=0.3, test=0.2), 5, tmp_path / "b")
    assert all(paths[n].read_bytes() == again[n].read_bytes() for n in paths)
    other = t.prepare(config(source, rewards, validation=0.3, test=0.2), 6, tmp_path / "c")
    assert asked(other["test"]) != asked(paths["test"])


def test_equal_prompts_are_one_whatever_their_case_and_space(tmp_path: Path, rewards: str) -> None:
    texts = [f"Say the word {word}" for word in ("red", "green", "blue", "black", "white", "grey")]
    forms = (str, str.upper, lambda s: f"{s}  ", lambda s: s.replace(" ", "\n"))
    rows: list[Any] = [{"prompt": form(text), "answer": ""} for text in texts for form in forms]
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": texts[0]}]
    rows.append({"prompt": system, "answer": ""})
    source = write(tmp_path / "rows.jsonl", rows)
    paths = t.prepare(config(source, rewards, validation=0.4, test=0.3), 0, tmp_path / "data")
    splits = [{" ".join(text.casefold().split()) for text in asked(p)} for p in paths.values()]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 6


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_no_cluster_stands_in_two_splits(suffix: str, tmp_path: Path, rewards: str) -> None:
    # Clusters 0 to 8 of four prompts each; 9 joins 8, for one prompt is in both. Two have none.
    rows = [{**row, "cluster": i // 4} for i, row in enumerate(sums(36))]
    rows += [{**rows[-1], "cluster": 9}, {**sums(40)[-1], "cluster": 9}, *sums(38)[-2:]]
    if suffix == "csv":
        lines = [f"{r['prompt']},{r['answer']},{r.get('cluster', '')}\n" for r in rows]
        source = str(tmp_path / "rows.csv")
        Path(source).write_text("".join(["prompt,answer,cluster\n", *lines]))
    else:
        source = write(tmp_path / "rows.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"prompt": "Another?", "answer": "", "cluster": "0"}])
    named = config(source, rewards, validation=0.3, test=test)
    paths = t.prepare(named, 0, tmp_path / "data")
    splits = [{str(r["cluster"]) for r in load(p) if "cluster" in r} for p in paths.values()]
    splits = [{"8" if name == "9" else name for name in split} for split in splits]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 9
    assert all(splits)


def test_files_of_ones_own_win_over_training(
    tmp_path: Path, rewards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "rows.jsonl", sums(30, n=1) + sums(30, n=2))
    validation = write(tmp_path / "validation.jsonl", sums(12))
    test = write(tmp_path / "test.jsonl", sums(10))
    named = config(source, rewards, validation=validation, test=test)
    paths = t.prepare(named, 5, tmp_path / "a")
    sizes = {name: len(load(path)) for name, path in paths.items()}
    assert sizes == {"train": 36, "validation": 2, "test": 10}
    out = capsys.readouterr().out
    assert "10 rows left out of validation, because test has their prompts or clusters; " in out
    assert "20 rows left out of train, because test has their prompts or clusters; " in out
    assert f"{source}, line 1 is like {test}, line 1" in out
    assert "4 rows left out of train, because validation has their prompts or clusters; " in out
    assert f"{source}, line 11 is like {validation}, line 11" in out
    with pytest.raises(DataError, match=r"No row is left for train"):
        t.prepare(config(test, rewards, validation=source, test=validation), 5, tmp_path / "b")
    with pytest.raises(DataError, match=r"No row is left for validation"):
        t.prepare(config(source, rewards, validation=test, test=validation), 5, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_nearly_equal_prompts_are_reported(
    tmp_path: Path, rewards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    story = "Write a story about a lighthouse keeper who finds a letter in a bottle"
    source = write(tmp_path / "rows.jsonl", [*sums(5), {"prompt": f"{story}.", "answer": ""}])
    near = [{"prompt": f"{story} on the beach!", "answer": ""}, {"prompt": "5 + 1 =", "answer": ""}]
    test = write(tmp_path / "test.jsonl", near)
    t.prepare(config(source, rewards, validation=0.2, test=test), 1, tmp_path / "data")
    out = capsys.readouterr().out
    assert "train and test share nearly equal prompts, which stay in both (1 in train); " in out
    assert f"{source}, line 6 and {test}, line 1" in out, "a sum of other numbers is another prompt"


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
    third = write(tmp_path / "third.jsonl", [{"prompt": "newer", "answer": ""}])
    paths = t.prepare(
        config(source, rewards, validation=other, test=third, system="S"), 0, tmp_path / "data"
    )
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


def test_what_a_reward_reads_is_as_the_file_has_it(tmp_path: Path, rewards: str) -> None:
    """Gold answers and tests to the byte; the prompt and what is learned from are cleaned."""
    gold = "  caf\u00c3\u00a9 &amp; \ufb01\r\n\n"
    more = {"completion": gold, "tests": [gold], "id": gold}
    source = write(tmp_path / "rows.jsonl", [{**r, **more} for r in sums(20)])
    paths = t.prepare(config(source, rewards), 0, tmp_path / "data")
    for split in ("train", "test"):
        for row in load(paths[split]):
            assert (row["completion"], row["tests"], row["id"]) == (gold, [gold], gold)
    [answer] = {row["messages"][-1]["content"] for row in load(paths["labelled"])}
    assert answer == "  caf\u00e9 &amp; \ufb01"


@pytest.mark.parametrize("column", ["completions", "prompts", "completion_ids"])
def test_a_column_with_the_name_of_an_argument_of_rewards_is_refused(
    column: str, tmp_path: Path, rewards: str
) -> None:
    rows = [{**row, **({column: "x"} if i == 11 else {})} for i, row in enumerate(sums(12))]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 12: .*`{column}`; rename the column"):
        t.prepare(config(source, rewards), 0, tmp_path / "data")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud83d"])
def test_what_json_cannot_hold_is_named_by_row(value: Any, tmp_path: Path, rewards: str) -> None:
    bad = 11
    rows = [{**row, "x": value if i == bad else 0.5} for i, row in enumerate(sums(12))]
    if isinstance(value, str):
        source = write(tmp_path / "rows.jsonl", rows)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        source = str(tmp_path / "rows.parquet")
        parquet.write_table(sys.modules["pyarrow"].Table.from_pylist(rows), source)
    with pytest.raises(DataError, match=r"rows\.\w+, (row|line) 12: `x` is .*, which JSON cannot"):
        t.prepare(config(source, rewards), 0, tmp_path / "data")


def test_sources_are_mixed_by_weight(tmp_path: Path, rewards: str) -> None:
    one = write(tmp_path / "one.jsonl", sums(6))
    two = str(tmp_path / "two.csv")
    with open(two, "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], ["1 + 1?", "2"], ["2 + 2?", "4"]])
    other = write(tmp_path / "test.jsonl", [{"prompt": "new", "answer": ""}])
    third = write(tmp_path / "third.jsonl", [{"prompt": "newer", "answer": ""}])
    mixed = config(one, rewards, validation=other, test=third)
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
    third = write(tmp_path / "third.jsonl", [{"prompt": "newer", "answer": ""}])
    with pytest.raises(DataError, match=match):
        t.prepare(config(source, rewards, validation=other, test=third), 0, tmp_path / "data")


def test_faults_of_the_recipe_are_one_line(tmp_path: Path, rewards: str) -> None:
    source = write(tmp_path / "rows.jsonl", sums(5))
    with pytest.raises(DataError, match=r"did you mean .*rows\.jsonl"):
        t.prepare(config(str(tmp_path / "row.jsonl"), rewards), 0, tmp_path / "data")
    with pytest.raises(ConfigError, match="no function `exakt`"):
        t.prepare(config(source, rewards.replace("exact", "exakt")), 0, tmp_path / "data")
    with pytest.raises(ConfigError, match=r"a share between 0 and 1, or a file"):
        t.prepare(config(source, rewards, validation=1.5), 0, tmp_path / "data")
    with pytest.raises(DataError, match=r"no file .*prepare"):
        t.RowsEnvironment(tmp_path / "none.jsonl", rewards)
    assert not (tmp_path / "data").exists()
