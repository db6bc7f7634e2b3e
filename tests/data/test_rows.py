"""Rows: every format, every kind of file, cleaning, and mixtures."""

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from gearshift.data import (
    ChatExample,
    CleanConfig,
    Mixture,
    TextExample,
    clean,
    load_rows,
    to_preference,
    to_prompt,
    to_supervised,
)
from gearshift.errors import DataError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}

SUPERVISED = {
    "messages": {"messages": [USER, BOT]},
    "prompt and completion": {"prompt": "hi", "completion": "yo"},
    "prompt and completion as messages": {"prompt": [USER], "completion": [BOT]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    },
    "alpaca": {"instruction": "hi", "input": "", "output": "yo"},
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_formats(name: str) -> None:
    assert to_supervised(SUPERVISED[name]) == ChatExample([USER, BOT])


def test_other_supervised_rows() -> None:
    assert to_supervised({"text": "hi"}) == TextExample("hi")
    example = to_supervised({"instruction": "add", "input": "1 2", "output": "3"})
    assert isinstance(example, ChatExample) and example.messages[0]["content"] == "add\n\n1 2"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"prompt": [USER], "chosen": [BOT], "rejected": "no"},
        {"prompt": [USER], "chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "no"}]},
        {"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "no"}]},
    ],
)
def test_preference_formats(row: dict) -> None:
    example = to_preference(row)
    assert (example.prompt, example.chosen, example.rejected) == ([USER], "yo", "no")


def test_prompt_formats() -> None:
    example = to_prompt({"prompt": "hi", "answer": 4})
    assert (example.prompt, example.columns) == ([USER], {"answer": 4})
    assert to_prompt({"messages": [USER, BOT]}).prompt == [USER]


BAD = [
    (to_supervised, {"question": "a"}, "question"),
    (to_supervised, {"messages": []}, "messages"),
    (to_supervised, {"messages": ["hi"]}, "messages"),
    (to_supervised, {"messages": [USER]}, "no assistant"),
    (to_supervised, {"messages": [{"role": "user", "content": None}]}, "content"),
    (to_supervised, {"prompt": "", "completion": "b"}, "prompt"),
    (to_supervised, {"prompt": [USER, BOT], "completion": "b"}, "completion"),
    (to_supervised, {"conversations": [{"from": "bing", "value": "x"}]}, "bing"),
    (to_supervised, {"instruction": "a", "output": ""}, "output"),
    (to_supervised, {"text": 3}, "text"),
    (to_preference, {"prompt": "a", "chosen": "b"}, "rejected"),
    (to_preference, {"prompt": "a", "chosen": "b", "rejected": "b"}, "same"),
    (to_preference, {"chosen": [USER, BOT], "rejected": [BOT]}, "last message"),
    (to_preference, {"prompt": "a", "chosen": [USER], "rejected": "b"}, "chosen"),
    (to_prompt, {"text": "a"}, "text"),
    (to_prompt, {"messages": [BOT]}, "no prompt"),
]


@pytest.mark.parametrize(("convert", "row", "named"), BAD, ids=lambda v: str(v)[:40])
def test_bad_rows_are_named(convert, row: dict, named: str) -> None:
    with pytest.raises(DataError, match=named) as error:
        convert(row)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


ROWS = [{"prompt": 'hé, "quoted"\nline', "completion": "a"}, {"prompt": "b", "completion": "c"}]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert load_rows(str(tmp_path / f"a.{kind}")) == ROWS, kind


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"a": 1}\n{"b": }\n', "line 2"),
        ("a.jsonl", b'"a"\n', "line 1 is not an object"),
        ("a.json", b'{"a": 1}', "list of rows"),
        ("a.json", b"[{},", "line 1"),
        ("a.csv", b"x,y\n1\n", "line 2"),
        ("a.csv", b"x,y\n1,2,3\n", "line 2"),
        ("a.parquet", b"nonsense", "not Parquet"),
        ("a.jsonl", b"\xff\xfe{}", "UTF-8"),
        ("a.txt", b"hello", "none of"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"did you mean .*train\.jsonl"):
        load_rows(str(tmp_path / "trian.jsonl"))


def test_cleaning() -> None:
    rows = [
        {"text": "donâ€™t  do\r\n\tthis  "},
        {"text": "  "},
        {"text": "same"},
        {"text": "\n same\n"},
        {"text": "\nsame \n"},
        {"text": "x"},
        {"text": "y" * 99},
        {"messages": [USER, {**BOT, "content": ""}]},
        {"instruction": "go", "input": "", "output": "ok"},
    ]
    kept, report = clean(rows, CleanConfig(min_chars=2, max_chars=50))
    assert kept == [
        {"text": "don\u2019t  do\n\tthis"},
        {"text": "same"},
        {"text": " same"},
        {"instruction": "go", "input": "", "output": "ok"},
    ]
    assert (report.rows, report.kept, report.empty, report.duplicate, report.length) == (
        9,
        4,
        2,
        1,
        2,
    )
    assert str(report).startswith("4 of 9 rows kept") and "\n" not in str(report)
    untouched, _ = clean(rows[:1], CleanConfig(fix_text=False, strip=False))
    assert untouched == rows[:1]


def test_a_mixture_walks_each_source_evenly() -> None:
    sources = [[f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)]]
    mixture = Mixture(sources, [1.0, 3.0], seed=1)
    epoch = [mixture.example_at(i) for i in range(len(mixture))]
    kinds = Counter(x[0] for x in epoch)
    assert kinds == {"a": 10, "b": 30}
    assert set(Counter(x for x in epoch if x[0] == "b").values()) == {3}
    three = Counter(mixture.example_at(i) for i in range(3 * len(mixture)))
    assert all(three[a] == 1 for a in sources[0])  # 30 draws of a in three epochs: each row once


def test_a_mixture_is_a_function_of_seed_and_position() -> None:
    rows = list(range(17))
    one, same, other = (Mixture([rows], [1.0], seed=s) for s in (1, 1, 2))
    assert one.batch(5, 4) == [same.example_at(i) for i in range(20, 24)]
    assert sorted(one.batch(0, 17)) == rows
    assert one.batch(0, 17) != one.batch(1, 17) and one.batch(0, 17) != other.batch(0, 17)
    with pytest.raises(DataError, match="Source 2"):
        Mixture([[1], []], [1, 1], seed=0)
