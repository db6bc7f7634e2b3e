"""Where rows come from: JSONL, JSON, CSV, Parquet, or a data set's name on the Hugging Face hub."""

from __future__ import annotations

import csv
import difflib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from gearshift.data.clean import CleanConfig
from gearshift.errors import DataError
from gearshift.runtime.config import Config

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")


class SourceConfig(Config):
    """One source of rows."""

    path: str
    """A file (JSONL, JSON, CSV, Parquet), a data set's name on the hub, or `task:NAME`, a file that
    the task made.
    """
    weight: float = Field(1.0, gt=0)
    """Its share of the mixture, relative to the other sources'."""
    split: str = "train"
    """Which split of a data set on the hub."""
    limit: int | None = Field(None, ge=1)
    """Use the first rows only."""


class DataConfig(Config):
    """What a stage learns from."""

    sources: tuple[SourceConfig, ...] = ()
    """Mixed by weight."""
    clean: CleanConfig = CleanConfig()
    """Applied to each source."""


def load_rows(path: str, split: str = "train") -> list[Row]:
    """All rows of a file or a data set. Raises `DataError` that names the file and the line."""
    file = Path(path)
    if not file.suffix and not file.exists() and not path.startswith((".", "/", "~")):
        return _from_hub(path, split)
    if file.suffix.lower() not in _SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(_SUFFIXES)}; convert it to one of them.")
    if not file.is_file():
        raise DataError(f"{path} does not exist{_nearest(file)}.")
    rows = _READERS[file.suffix.lower()](file)
    if not rows:
        raise DataError(f"{path} has no rows; give a file with at least one.")
    return rows


def _jsonl(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}, line {number} is not JSON ({error.msg}); mend or delete the line."
            ) from None
        rows.append(_object(row, f"{file}, line {number}"))
    return rows


def _json(file: Path) -> list[Row]:
    try:
        rows = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}, line {error.lineno} is not JSON ({error.msg}); mend it."
        ) from None
    if not isinstance(rows, list):
        raise DataError(f"{file} holds no list of rows; wrap them in [ ], or use JSONL.")
    return [_object(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _csv(file: Path) -> list[Row]:
    reader = csv.DictReader(_text(file).splitlines(keepends=True), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}, line {reader.line_num} has not as many fields as the header; "
                    "mend or delete the line."
                )
            rows.append(dict(row))
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num} is not CSV ({error}); mend or delete the line."
        ) from None
    return rows


def _parquet(file: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{file} needs Parquet support; pip install 'gearshift[data]'.") from None
    try:
        return list(parquet.read_table(file).to_pylist())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} is not Parquet ({str(error).splitlines()[0]}); write it anew."
        ) from None


def _from_hub(name: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is no file here, and a data set of the hub needs pip install "
            "'gearshift[data]'."
        ) from None
    try:
        return [dict(row) for row in datasets.load_dataset(name, split=split)]
    except Exception as error:  # the library raises a great many kinds
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{name} is neither a file nor a data set that could be loaded ({reason}); "
            "check the name."
        ) from None


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it.") from None


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict) or not row:
        raise DataError(f"{where} is not an object with keys; mend or delete it.")
    return row


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f", nor does its folder {file.parent}"
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.iterdir()], 1)
    return f"; did you mean {file.parent / near[0]}?" if near else ""
