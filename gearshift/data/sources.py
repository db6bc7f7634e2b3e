"""Where rows come from: JSONL, JSON, CSV, Parquet, or a data set's name on the Hugging Face hub."""

from __future__ import annotations

import csv
import difflib
import io
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from gearshift.data.clean import CleanConfig
from gearshift.data.formats import SourceRow
from gearshift.errors import DataError
from gearshift.runtime.config import Config

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


def load_rows(path: str, split: str = "train") -> list[SourceRow]:
    """All rows of a file or a data set. Raises `DataError` that names the file and the line."""
    file = Path(path).expanduser()
    known = file.suffix.lower() in _SUFFIXES
    # Names on the hub may have dots (`owner/set-v1.5`); a file's folder is there.
    if not (file.exists() or known or path.startswith((".", "/", "~"))) and (
        not file.suffix or not file.parent.is_dir()
    ):
        return _from_hub(path, split)
    if not file.exists():
        raise DataError(f"{path} does not exist{_nearest(file)}")
    if not file.is_file():
        raise DataError(f"{path} is a folder; name a file in it.")
    if not known:
        raise DataError(f"{path} is none of {', '.join(_SUFFIXES)}; convert it to one of them.")
    rows = _READERS[file.suffix.lower()](file)
    if not rows:
        raise DataError(f"{path} has no rows; give a file with at least one.")
    return rows


def _jsonl(file: Path) -> list[SourceRow]:
    rows = []
    # Not splitlines(): a JSON string may hold a raw U+2028, which is no line end.
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken, or a number or nesting too large
            raise DataError(
                f"{file}, line {number} is not JSON ({error}); mend or delete the line."
            ) from None
        rows.append(_object(row, f"{file}, line {number}"))
    return rows


def _json(file: Path) -> list[SourceRow]:
    try:
        rows = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); mend it.") from None
    if not isinstance(rows, list):
        raise DataError(f"{file} holds no list of rows; wrap them in [ ], or use JSONL.")
    return [_object(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _csv(file: Path) -> list[SourceRow]:
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    rows = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{file}, line {reader.line_num} has not as many fields as the header; "
                    "mend or delete the line."
                )
            rows.append(SourceRow(row, f"{file}, line {reader.line_num}"))
    except csv.Error as error:
        raise DataError(
            f"{file}, line {reader.line_num} is not CSV ({error}); mend or delete the line."
        ) from None
    return rows


def _parquet(file: Path) -> list[SourceRow]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{file} needs Parquet support; pip install 'gearshift[data]'.") from None
    try:
        rows = parquet.ParquetFile(file).read().to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} is not Parquet ({str(error).splitlines()[0]}); write it anew."
        ) from None
    return [SourceRow(row, f"{file}, row {number}") for number, row in enumerate(rows, start=1)]


def _from_hub(name: str, split: str) -> list[SourceRow]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{name} is no file here, and a data set of the hub needs pip install "
            "'gearshift[data]'."
        ) from None
    try:
        rows = datasets.load_dataset(name, split=split)
        return [SourceRow(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]
    except Exception as error:  # the library raises a great many kinds
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{name} is neither a file nor a data set that could be loaded ({reason}); "
            "check the name."
        ) from None


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")  # as it is: CSV's line ends are its own
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); convert it.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); check its rights.") from None


def _object(row: Any, where: str) -> SourceRow:
    if not isinstance(row, dict) or not row:
        raise DataError(f"{where} is not an object with keys; mend or delete it.")
    return SourceRow(row, where)


def _nearest(file: Path) -> str:
    if not file.parent.is_dir():
        return f", nor does its folder {file.parent}; check the path."
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.iterdir()], 1)
    return f"; did you mean {file.parent / near[0]}?" if near else "; check the path."
