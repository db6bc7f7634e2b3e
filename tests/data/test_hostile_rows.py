"""Rows that nest deep, are huge or come from what is no file: one line that says where, at once."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import clean, load_rows, to_preference, to_supervised
from gearshift.data.chat_template import MAX_SIZE, render_template
from gearshift.data.clean import CleanConfig
from gearshift.data.overlap import prompt_text
from gearshift.data.sources import MAX_ROW_SIZE
from gearshift.errors import DataError, OverlongError
from tests.data.conftest import FAMILIES

DEEP = "[" * 500 + "]" * 500
ARGUMENTS = '{"a":' * 500 + "1" + "}" * 500
CALL = {"function": {"name": "f", "arguments": ARGUMENTS}}
CALLING = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [CALL]}]
HOSTILE: dict[str, tuple[str, str, str]] = {
    "deep": ("a.jsonl", '{"text": "a", "x": ' + DEEP + "}", "line 1 is not JSON .*100 deep"),
    "deep objects": ("a.jsonl", '{"a":' * 3000, "line 1 is not JSON .*100 deep"),
    "deep file": ("a.json", "[" * 100_000, "is not JSON .*100 deep"),
    "deep JSON in a text": ("a.jsonl", json.dumps({"messages": CALLING}), "line 1.*100 deep"),
    "a huge row": ("a.jsonl", '{"a": 1}\n"' + "a" * MAX_ROW_SIZE, "line 2 has 16,777,217 char"),
    "a huge row in a list": (
        "a.json", json.dumps([{"text": "a"}, {"text": "a" * MAX_ROW_SIZE + "a"}]), "row 2 has 16,7",
    ),
    "a huge cell": ("a.csv", "text\na\n" + "a" * (MAX_ROW_SIZE + 1), "line 3 has 16,777,217 char"),
    "many columns": ("a.csv", ",".join(map(str, range(200_000))), "line 1 has 200,000 columns"),
    "many keys": (
        "a.jsonl", json.dumps(dict.fromkeys(map(str, range(200_000)))), "line 1 has 200,000 col",
    ),
    "one key of many twice": (
        "a.jsonl", json.dumps(dict.fromkeys(map(str, range(200_000))))[:-1] + ', "7": 1}', "'7'",
    ),
    "a huge number": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
    "a large margin": (
        "a.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": ' + "9" * 4000 + "}",
        "line 1: `margin` is 9999",
    ),
    "a mark in the middle": ("a.jsonl", '{"text": "a"}\n\ufeff{"text": "b"}', "line 2 is not JSON"),
    "cut": ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2 is not JSON"),
    "control characters": ("a.jsonl", '{"\\u001b[31mx": 1}', r"the keys are \\x1b\[31mx;"),
    "a long role": ("a.jsonl", json.dumps({"messages": [{"role": "x" * 10**6}]}), "is no role"),
    "a long key": (
        "a.jsonl",
        json.dumps({"messages": [{"role": "user", "content": "a", "k" * 10**6: 1}]}),
        "take it out",
    ),
}  # fmt: skip


def read(path: Path) -> list[Any]:
    rows, _ = clean(load_rows(str(path)), CleanConfig(), answered=True)
    return [(to_preference if "chosen" in row else to_supervised)(row) for row in rows]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_one_line(name: str, tmp_path: Path) -> None:
    file, text, what = HOSTILE[name]
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=what) as error:
        read(tmp_path / file)
    assert file in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_odd_rows_are_rows(tmp_path: Path) -> None:
    lines = [
        '{"__class__": "x", "text": "a", "__init__": 1}',
        '{"text": "a\\u0000b"}',
        '{"text": "\\ud800", "k\\ud800": "\\udfff"}',
        '{"text": "a", "x": ' + "[" * 90 + "]" * 90 + "}",
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert [row.text for row in read(tmp_path / "a.jsonl")] == ["a", "a\0b", "\ufffd", "a"]


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for path, what in (
        (tmp_path / "fifo.jsonl", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "loop.jsonl", "does not exist"),
        (tmp_path / ("a" * 5000), "cannot be a file"),
    ):
        with pytest.raises(DataError, match=what):
            load_rows(str(path))


def test_a_small_file_that_becomes_huge_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bytes(100 << 20), 6))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz becomes more than 200 times as large"):
        load_rows(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("encoded", [False, True])
def test_a_small_table_that_becomes_huge_is_not_read(encoded: bool, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    column = arrow.array(["x" * 100_000] * 2000)
    table = arrow.table({"text": column.dictionary_encode() if encoded else column})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="becomes more than 200 times as large"):
        load_rows(str(tmp_path / "a.parquet"))
    content = (tmp_path / "a.parquet").read_bytes()
    for broken in (content[:-20], content[:4] + bytes(100) + content[104:], b""):
        (tmp_path / "a.parquet").write_bytes(broken)
        with pytest.raises(DataError, match="is not Parquet"):
            load_rows(str(tmp_path / "a.parquet"))


def test_a_conversation_that_no_model_reads_is_not_tokenized() -> None:
    said = [{"role": "user", "content": "a" * MAX_SIZE}]
    with pytest.raises(OverlongError, match="characters, over 4,194,304"):
        render_template(FAMILIES["phi"].tokenizer, said, {"x": "b"})


def test_text_that_is_slow_to_clean_or_to_compare_is_left_as_it_is() -> None:
    """A million lines, and marks without end on one letter: each took minutes."""
    lines, marks = "é\n" * 1_000_000 + "Ã©", "a" + "\u0301\u0316" * 100_000
    [row], _ = clean([{"text": lines}], CleanConfig())
    assert row["text"] == lines
    assert prompt_text([{"role": "user", "content": marks}]) == f"user: {marks}"
    assert prompt_text([{"role": "user", "content": "E\u0301 \uff21"}]) == "user: é a"
