"""Files as people have them: odd line ends, names like a file's, formats without their extra."""

import sys
from pathlib import Path

import pytest

from gearshift.data import load_rows
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
    ],
    ids=["no keys", "huge number", "deep nesting", "open quote", "header alone"],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named) as error:
        load_rows(str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)


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
