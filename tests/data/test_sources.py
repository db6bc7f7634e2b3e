"""Files as people have them: odd line ends, names like a file's, formats without their extra."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import SourceConfig, load_rows
from gearshift.data.sources import source_digest
from gearshift.errors import DataError


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n{"text": "d"}')
    (tmp_path / "a.csv").write_bytes("text,n\r\na\u2028b\x85c,1\r\nd,2\r\n".encode())
    for kind in ("jsonl", "csv"):
        rows = load_rows(str(tmp_path / f"a.{kind}"))
        assert [row["text"] for row in rows] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b"{}\n", "line 1 is not an object"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("a.csv", b'x,y\n"1,2\n', "not CSV"),
        ("a.csv", b"x,y\n", "no rows"),
        ("a.jsonl", b'{"m": 1}\n{"m": NaN}\n', "line 2 is not JSON .NaN"),
        ("a.jsonl", b'{"m": {"x": [-Infinity]}}\n', "line 1 is not JSON .-Infinity"),
        ("a.jsonl", b'\n{"m": 1e999}\n', "line 2 is not JSON .the number 1e999"),
        ("a.json", b'[{"m": NaN}]', "not JSON .NaN"),
        ("a.jsonl", b'{"m": 1, "m": 2}\n', "line 1 is not JSON .the key 'm' is given twice"),
        ("a.jsonl", b'{"a": [{"m": 1, "m": 2}]}\n', "'m' is given twice"),
        ("a.json", b'{"a": 1}\n{oops}\n', "line 2"),
        ("a.json", b'{"train": [{"a": 1}], "test": [{"a": 1}]}', "no list of rows"),
        ("a.csv", b"x,x\n1,2\n", "line 1 names the column 'x' twice"),
        ("a.csv", b"x,\n1,2\n", "line 1 has a column without a name"),
        ("a.csv", b"x;y\n1;2\n", "line 1 is separated by ';'"),
        ("a.csv", b"x\ty\n1\t2\n", "line 1 is separated by"),
        ("a.csv", b'x,y\n"1\n2",3\n\n"4\n5"\n', "line 5 has another number of fields"),
        ("a.csv", b'x,y\n"1\n2",3\n"4\n5,6', "line 4 is not CSV"),
        ("a.jsonl.gz", b"\x1f\x8b\x08nonsense", "not complete"),
        ("a.tsv", b"x\ty\n", "none of"),
    ],
    ids=[
        "no keys",
        "huge number",
        "deep nesting",
        "open quote",
        "header alone",
        "NaN",
        "infinity",
        "too large",
        "NaN in a list",
        "a key twice",
        "a key twice inside",
        "lines in JSON",
        "several lists",
        "a column twice",
        "no name",
        "semicolons",
        "tabs",
        "short row",
        "open quote below",
        "torn gzip",
        "other kind",
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_source_that_changed_is_known_by_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}')
    before = source_digest(str(path))
    path.write_text('{"text": "b"}')
    assert source_digest(str(path)) != before
    marks = []
    for text in ("a", "b", "b"):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, t=text: [{"text": t}])
        assert load_rows("owner/changed") == [{"text": text}]
        marks.append(source_digest("owner/changed"))
    assert marks[0] != marks[1] == marks[2]
    assert source_digest("owner/other") == marks[2], "what was not loaded is"


def test_a_name_is_of_the_hub_only_if_it_cannot_be_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [{"text": f"{name} {split}"}])
    for name in ("set", "owner/set", "owner/set-v1.5"):
        assert load_rows(name, "test") == [{"text": f"{name} test"}]
    (tmp_path / "owner").mkdir()
    for name in ("owner/set-v1.5", "./set", "rows.txt", "rows.csv", "nowhere/rows.csv"):
        with pytest.raises(DataError, match="does not exist"):
            load_rows(name)
    with pytest.raises(DataError, match="folder"):
        load_rows("owner")


@pytest.mark.parametrize(
    ("name", "module"), [("a.parquet", "pyarrow.parquet"), ("owner/set", "datasets")]
)
def test_a_missing_extra_is_named(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'gearshift\[data\]'"):
        load_rows(name)


ROWS = [{"text": "a"}, {"text": "b\u2028"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.ndjson", "a.jsonlines", "a.jl", "a.json", "a.JSON", "a.txt", "a", "train.log"],
)
@pytest.mark.parametrize("start", ["", "\ufeff", "\n \n"])
def test_json_lines_have_any_name(name: str, start: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(start + LINES, encoding="utf-8")
    rows = load_rows(str(tmp_path / name))
    assert rows == ROWS
    assert rows[1].where == f"{tmp_path / name}, line {4 if start[:1] == chr(10) else 2}"
    (tmp_path / "one.json").write_text(start + json.dumps(ROWS[0]), encoding="utf-8")
    assert load_rows(str(tmp_path / "one.json")) == ROWS[:1]


@pytest.mark.parametrize("wrap", [lambda r: r, lambda r: {"version": 1, "data": r, "tags": ["x"]}])
def test_a_list_may_stand_in_an_object(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(wrap(ROWS), indent=2))
    assert load_rows(str(tmp_path / "a.json")) == ROWS
    chat = {"messages": [{"role": "user", "content": "a"}]}
    (tmp_path / "one.json").write_text(json.dumps(chat, indent=2))
    assert load_rows(str(tmp_path / "one.json")) == [chat], "one row is no list of messages"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", LINES.encode()),
        ("a.json.gz", json.dumps(ROWS).encode()),
        ("a.csv.gz", "text\na\nb\u2028\n".encode()),
    ],
)
def test_compressed_files_are_read(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content))
    assert load_rows(str(tmp_path / name)) == ROWS


def test_what_csv_allows(tmp_path: Path) -> None:
    """Long cells, quotes and newlines in quotes, blank lines, a byte order mark, any line end."""
    long = "x" * 300_000
    cells = [[long, "1"], ['say "hi",\nthen\r\ngo', "2"], ["", "3"]]
    for end in ("\n", "\r\n"):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator=end).writerows([["text", "n"], *cells])
        blank = text.getvalue().replace(f"text,n{end}", f"text,n{end}{end}")
        (tmp_path / "a.csv").write_bytes(("\ufeff" + blank).encode())
        rows = load_rows(str(tmp_path / "a.csv"))
        assert [list(row.values()) for row in rows] == cells
        assert [row.where.split(", ")[1] for row in rows] == ["line 3", "line 4", "line 7"]


def test_a_link_is_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "blob").write_text("text\nb\n")
    (tmp_path / "latest").symlink_to("a.csv")
    (tmp_path / "b.csv").symlink_to("blob")
    assert load_rows(str(tmp_path / "latest")) == [{"text": "a"}]
    assert load_rows(str(tmp_path / "b.csv")) == [{"text": "b"}]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rows(SourceConfig(path="~/latest").path) == [{"text": "a"}]


def test_a_table_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "completion"])
    import pyarrow.parquet as parquet

    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet names the column 'completion' twice"):
        load_rows(str(tmp_path / "a.parquet"))
