"""Reads rows from JSONL, JSON, CSV and Parquet files, and from data sets on the Hugging Face
hub.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field

from gearshift.data.clean import CleanConfig
from gearshift.data.formats import SourceRow
from gearshift.data.hub_rows import digest_of_hub, rows_of_hub
from gearshift.data.labels import (
    PREFIX,
    Format,
    Labels,
    is_label_file,
    label_rows,
    read_events,
    source_file,
)
from gearshift.data.messages import show
from gearshift.data.rows import TEXT_COLUMNS, from_json, text_size
from gearshift.errors import DataError
from gearshift.runtime.config import Config, Neutral, PathText
from gearshift.runtime.digests import file_digest
from gearshift.runtime.terminal import one_line

_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
_SUFFIXES = (*_LINES, ".json", ".csv", ".parquet")
MAX_ROW_SIZE = 1 << 24
"""How many characters a row may have: several times what the longest contexts hold."""
MAX_COLUMNS = 10_000
_UNPACKED, _UNPACKED_LEAST, _ROWS_LEAST, _BATCH = 200, 1 << 26, 1 << 20, 64
_TOO_LARGE = (
    f"becomes more than {_UNPACKED} times as large when it is read; if that is right, write it as "
    "JSONL that is not compressed."
)


class SourceConfig(Config):
    """One source of rows: where it is, and how much of it is used."""

    path: PathText
    """A file (JSONL, JSON, CSV, each also with `.gz`, or Parquet), the name of a data set on the
    Hugging Face hub, `task:NAME`, a file that the task makes, or `labels:RUN`, the labels that
    people gave in that run's folder. A folder `FILE.labels` has the labels of that file.
    """
    weight: float = Field(default=1.0, gt=0)
    """The source's share of the examples, relative to the weights of the other sources."""
    split: str = "train"
    """The split to read, for a data set on the Hugging Face hub."""
    limit: int | None = Field(default=None, ge=1)
    """How many rows to use, counted from the first; null uses all."""


class DataConfig(Config):
    """The data that a stage learns from."""

    sources: tuple[SourceConfig, ...] = ()
    """The sources of the rows; they are mixed by weight."""
    clean: CleanConfig = CleanConfig()
    """How the rows of each source are cleaned."""
    # A run that went on under `error` had no such row, so `drop` would not have changed it.
    overlong: Neutral[Literal["error", "drop"]] = "error"
    """What happens to rows with more tokens than `max_length` or than the model accepts: `error`
    names the file and line before the first step; `drop` leaves them out and counts them.
    """


def load_rows(path: str, split: str = "train", labels: Format | None = None) -> list[SourceRow]:
    """All rows of a file or a data set. Labels of people give their rows in the format `labels`;
    None gives those of every format. Raises `DataError` with the file and the line.
    """
    if is_on_hub(path):
        return rows_of_hub(path, split)
    file = source_file(path)
    if not file.exists():
        raise DataError(f"{path} does not exist{_nearest(file)}")
    if file.is_dir():
        raise DataError(f"{path} is a folder; name a file in it.")
    if split != "train":
        raise DataError(f"{path} is a file, which has no split {show(split)}; leave out `split`.")
    if not file.is_file():  # a pipe or a device may have no end, and cannot be read twice
        raise DataError(f"{path} is not a regular file; write its content into one.")
    kind = _kind(file)
    if is_label_file(file):
        rows = _labelled(file, labels)
    else:
        rows = _parquet(file) if kind == ".parquet" else _read(file, kind)
    if not rows:
        raise DataError(f"{path} has no rows; give a file with at least one.")
    return rows


def is_on_hub(path: str) -> bool:
    """Whether the path names a data set on the hub. Raises `DataError` for what can be no path."""
    file = source_file(path)
    try:
        named = file.exists() or _kind(file) or path.startswith((".", "/", "~", PREFIX))
    except (OSError, ValueError) as error:  # the path is too long, or no path at all
        raise DataError(f"{one_line(path, 100)} cannot be a file ({error.args[-1]}).") from None
    # Names on the hub may contain dots (`owner/set-v1.5`); a file's folder exists.
    return not named and (not file.suffix or not file.parent.is_dir())


def source_digest(path: str, split: str = "train") -> str:
    """A digest that differs between two versions of a source: that of the file, or of the rows that
    the hub gave.
    """
    file = source_file(path)
    if file.is_file():
        return file_digest(file)
    return digest_of_hub(path, split)


def _labelled(file: Path, labels: Format | None) -> list[SourceRow]:
    found = list(label_rows(Labels(read_events(file)[0]), labels))
    if not found:
        raise DataError(f"{file} has no labels that give such rows; label more, or use another.")
    return [SourceRow(row, f"{file}, row {number}") for number, row in enumerate(found, start=1)]


def _kind(file: Path) -> str:
    """The file's kind by its name; if the name does not show it, by the name of the file that a
    link points to.
    """
    for path in (file, Path(os.path.realpath(file))):
        suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
        if suffix.lower() in _SUFFIXES:
            return suffix.lower()
    return ""


def _read(file: Path, kind: str) -> list[SourceRow]:
    text = _text(file)
    if kind == ".csv":
        return list(_csv(file, text))
    # JSON Lines may have any name, except one that names another kind.
    start = text.lstrip()[:1]
    if not kind and start not in ("{", "["):
        raise DataError(f"{file} is none of {', '.join(_SUFFIXES)}; convert it to one of them.")
    if kind in _LINES or (start == "{" and not _is_one(text)):
        return list(_jsonl(file, text))
    return _json(file, text)


def _is_one(text: str) -> bool:
    """Whether a text that begins with an object contains only that object."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        # The text is broken: it is lines of objects if its first line is an object.
        try:
            json.loads(text.lstrip().split("\n", 1)[0])
        except (ValueError, RecursionError):
            return True
        return False
    return True


def _jsonl(file: Path, text: str) -> Iterator[SourceRow]:
    # splitlines() would be wrong: a JSON string may contain a raw U+2028, which is no line end.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            _check_size(len(line), where)
            yield _object(_parse(line, where, "correct or delete the line."), where)


def _json(file: Path, text: str) -> list[SourceRow]:
    """The rows of a list, of an object whose only list contains them, or one single row."""
    rows = _parse(text, str(file), "correct it.")
    if isinstance(rows, dict):
        lists = [v for v in rows.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if TEXT_COLUMNS & rows.keys():
            rows = [rows]
        elif len(lists) == 1:
            [rows] = lists
    if not isinstance(rows, list):
        raise DataError(f"{file} holds no list of rows; wrap them in [ ], or use JSONL.")
    found = [_object(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]
    for row in found if len(text) > MAX_ROW_SIZE else ():
        _check_size(text_size(row), row.where)
    return found


def _parse(text: str, where: str, what_to_do: str) -> Any:
    try:
        return from_json(
            text, object_pairs_hook=_pairs, parse_float=_float, parse_constant=_constant
        )
    except ValueError as error:  # broken JSON, or a number or a nesting that is too large
        raise DataError(f"{where} is not JSON ({one_line(str(error))}); {what_to_do}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {show(twice)} is given twice")
    return found


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {one_line(text, 40)} is too large")
    return number


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _csv(file: Path, text: str) -> Iterator[SourceRow]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            where, first = f"{file}, line {first}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, where)
            elif len(cells) != len(header):
                raise DataError(
                    f"{where} has another number of fields than the header; correct or delete "
                    "the line."
                )
            else:
                _check_size(sum(map(len, cells)), where)
                yield SourceRow(dict(zip(header, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(
            f"{file}, line {first} is not CSV ({error}); correct or delete the line."
        ) from None


def _header(names: list[str], where: str) -> list[str]:
    _check_columns(len(names), where)
    for name, count in Counter(names).items():
        if not name.strip() or count > 1:
            what = (
                f"names the column {show(name)} twice"
                if name.strip()
                else "has a column without a name"
            )
            raise DataError(f"{where} {what}; give each column a name of its own.")
    if len(names) == 1 and (separator := next((m for m in ";\t|" if m in names[0]), None)):
        raise DataError(f"{where} is separated by {separator!r}; separate the columns by commas.")
    return names


def _parquet(file: Path) -> list[SourceRow]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{file} needs Parquet support; pip install 'gearshift[data]'.") from None
    size = file.stat().st_size
    most = _UNPACKED_LEAST + _UNPACKED * size
    rows: list[SourceRow] = []
    try:
        with parquet.ParquetFile(file) as opened:
            _header(opened.schema_arrow.names, str(file))
            # A repeated value takes almost no space in the file, and its own space in each row.
            for batch in opened.iter_batches(_BATCH):
                most -= batch.nbytes
                if most < 0 or len(rows) > _ROWS_LEAST + size:
                    raise DataError(f"{file} {_TOO_LARGE}")
                for row in batch.to_pylist():
                    where = f"{file}, row {len(rows) + 1}"
                    most -= (held := text_size(row))
                    _check_size(held, where)
                    rows.append(SourceRow(row, where))
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds of errors
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{file} is not Parquet ({reason}); write it again.") from None
    return rows


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            most = _UNPACKED_LEAST + _UNPACKED * len(content)
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
                content = packed.read(most + 1)
            if len(content) > most:
                raise DataError(f"{file} {_TOO_LARGE}")
        return content.decode("utf-8-sig")  # unchanged, because CSV has its own line ends
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not complete ({error}); compress it again.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check its rights.") from None


def _check_size(size: int, where: str) -> None:
    if size > MAX_ROW_SIZE:
        raise DataError(
            f"{where} has {size:,} characters, over the {MAX_ROW_SIZE:,} that a row may have; "
            "split it, or delete it."
        )


def _check_columns(count: int, where: str) -> None:
    if count > MAX_COLUMNS:
        raise DataError(
            f"{where} has {count:,} columns, over the {MAX_COLUMNS:,} that a row may have; keep "
            "those that are read."
        )


def _object(row: Any, where: str) -> SourceRow:
    if not isinstance(row, dict) or not row:
        raise DataError(f"{where} is not an object with keys; correct or delete it.")
    _check_columns(len(row), where)
    return SourceRow(row, where)


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f", nor does its folder {file.parent}; check the path."
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.iterdir()], 1)
    return f"; did you mean {file.parent / near[0]}?" if near else "; check the path."
