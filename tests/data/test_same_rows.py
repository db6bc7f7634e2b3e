"""The same rows give the same data, whatever kind of file they lie in."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import (
    CleanConfig,
    clean,
    load_rows,
    to_preference,
    to_prompt,
    to_stepwise,
    to_supervised,
    to_unpaired,
)
from gearshift.tasks import rows as task

KINDS = ("jsonl", "json", "csv", "parquet")
Rows = Sequence[dict[str, Any]]


def write(folder: Path, rows: Rows, kind: str) -> str:
    """As such a file holds them: tables have every column in every row, CSV texts only."""
    path = folder / f"rows.{kind}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                cells = ["" if row.get(key) is None else row[key] for key in columns]
                writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        padded = [{key: row.get(key) for key in columns} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(padded), path)
    return str(path)


CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
OTHER = {"type": "function", "function": {"name": "go", "arguments": {"to": "y", "fast": True}}}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"at": {"type": "string"}}}},
    {"type": "function", "function": {"name": "go", "parameters": {"to": {"type": "string"}}}},
]
ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "yo"}
SUPERVISED = [
    {"messages": [{"role": "system", "content": ""}, ASK, SAY]},
    {
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": ""},
            {"role": "assistant", "content": "so", "reasoning_content": "hm"},
        ],
        "tools": TOOLS,
    },
    {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [OTHER]}]},
    {"messages": [ASK, {**SAY, "weight": 0}, ASK, {**SAY, "weight": 1}], "system": "S."},
    {"prompt": "a", "completion": "b", "chat_template_kwargs": {"style": "x"}},
    {"prompt": "an answer is missing"},
    {"prompt": "an answer is blank", "completion": " "},
    {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]]},
    {"instruction": "a", "input": "i", "output": "b"},
    {"text": "t"},
]
JUDGED = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "c", "label": False},
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5},
    {"prompt": "a", "chosen": "c", "rejected": "b"},
]
STEPS = [
    {"prompt": "a", "completions": ["1", "2"], "labels": [True, False]},
    {"prompt": "b", "completions": ["3"], "labels": [True]},
]
PROMPTS = [
    {"prompt": "a", "topic": "sums", "meta": "x"},
    {"prompt": "b", "topic": "", "completion": None},
    {"prompt": "c", "system": "S.", "tools": TOOLS},
]
CASES: list[tuple[Callable[[Any], Any], Rows, int]] = [
    (to_supervised, SUPERVISED, 8),
    (to_unpaired, JUDGED, 4),
    (to_preference, JUDGED[2:], 2),
    (to_stepwise, STEPS, 2),
    (to_prompt, PROMPTS, 3),
]


@pytest.mark.parametrize(
    ("convert", "rows", "count"), CASES, ids=lambda v: getattr(v, "__name__", "")
)
def test_every_kind_of_file_gives_equal_examples(
    convert: Callable[[Any], Any], rows: Rows, count: int, tmp_path: Path
) -> None:
    found = {}
    for kind in KINDS:
        loaded = load_rows(write(tmp_path, rows, kind))
        kept, report = clean(loaded, CleanConfig(), answered=convert is not to_prompt)
        assert report.empty == len(rows) - count, kind
        found[kind] = [convert(row) for row in kept]
    assert len(found["jsonl"]) == count
    for kind in KINDS:
        assert found[kind] == found["jsonl"], kind


def test_what_is_empty_is_not_given(tmp_path: Path) -> None:
    example = to_supervised({**SUPERVISED[0], "system": None, "tools": ""})
    assert example == to_supervised({"messages": [ASK, SAY]})
    [kept], report = clean([SUPERVISED[1]], CleanConfig())
    assert report.empty == 0 and kept == SUPERVISED[1]
    for blank in (
        {"messages": [ASK, {**SAY, "content": " "}]},
        {"messages": [{**ASK, "content": ""}, SAY]},
    ):
        assert clean([blank], CleanConfig())[1].empty == 1


def test_some_prompts_with_an_answer(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(10)]
    for i in (1, 4, 6):
        rows[i]["completion"] = str(i)
    (tmp_path / "reward.py").write_text("def f(completions, **_):\n    return [1.0] * 9\n")
    made = {}
    for kind in KINDS:
        config = task.RowsConfig(
            train=[{"path": write(tmp_path, rows, kind)}],
            validation=0.1,
            test=0.1,
            reward=f"{tmp_path / 'reward.py'}:f",
        )
        paths = task.prepare(config, 0, tmp_path / kind)
        made[kind] = {
            split: [json.loads(line) for line in path.read_text().splitlines()]
            for split, path in paths.items()
        }
    labelled = len(made["jsonl"]["labelled"])
    assert {split: len(rows) for split, rows in made["jsonl"].items()} == {
        "train": 8,
        "validation": 1,
        "test": 1,
        "labelled": labelled,
    }
    assert 1 <= labelled <= 3
    for kind in KINDS:
        assert made[kind] == made["jsonl"], kind


def test_a_prompts_tools_and_flags_reach_the_tasks_files(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [ASK, {**SAY, "train": False}, {**ASK, "content": str(i)}, SAY],
            "tools": TOOLS,
            "input": "the user's own",
        }
        for i in range(4)
    ]
    (tmp_path / "reward.py").write_text("def f(completions, **_):\n    return [1.0]\n")
    config = task.RowsConfig(
        train=[{"path": write(tmp_path, rows, "jsonl")}],
        validation=0.25,
        test=0.25,
        reward=f"{tmp_path / 'reward.py'}:f",
    )
    paths = task.prepare(config, 0, tmp_path / "data")
    [row, *_] = load_rows(str(paths["labelled"]))
    example = to_supervised(row)
    assert getattr(example, "untrained", None) == {1}
    assert getattr(example, "options", None) == {"tools": TOOLS}
    environment = task.RowsEnvironment(paths["train"], config.reward)
    _, info = environment.reset(seed=0, options={"row": 0})
    assert info["template_options"] == {"tools": TOOLS}
    assert [m["role"] for m in info["messages"]] == ["user", "assistant", "user"]
