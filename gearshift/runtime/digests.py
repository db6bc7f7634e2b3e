"""Digests of files, to tell later whether a file has changed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gearshift.errors import StorageError
from gearshift.runtime.files import digest, read_json, reading, sync, write_json, writing

Digests = dict[str, str]
"""For each file name: the file's size and the digest of its bytes."""
_SEAL = "digest"
_known: dict[tuple[int, ...], str] = {}
"""A cache: the digest for a file's identity and dates, so that no file is read twice."""
_GRAIN = 2_000_000_000
"""A file may change within this many nanoseconds and keep the same date."""


def file_digest(path: Path) -> str:
    """The size and the digest of a file. Raises `StorageError` if it cannot be read."""
    with reading(path):
        now = path.stat()
        key = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        if found := _known.get(key):
            return found
        found = f"{now.st_size}:{digest(path)}"
        if time.time_ns() - max(now.st_mtime_ns, now.st_ctime_ns) > _GRAIN:
            _known[key] = found
        return found


def file_digests(folder: Path, names: Iterable[str]) -> Digests:
    """The digests of files that were just written; it also forces the files onto the disk."""
    paths = {name: folder / name for name in names}
    with writing(folder):
        for path in (*paths.values(), *{path.parent for path in paths.values()}):
            sync(path)
    return {name: file_digest(path) for name, path in paths.items()}


def describe_difference(path: Path, known: str, whole: bool = True) -> str:
    """How a file differs from its known digest, as text; empty if it does not. Without `whole` only
    the size is compared.
    """
    if not path.is_file():
        return "it is gone"
    was, now = known.partition(":")[0], str(path.stat().st_size)
    if was != now:
        return f"it has {now} of {was} bytes"
    return "its digest is wrong" if whole and file_digest(path) != known else ""


def check_unchanged(folder: Path, known: Mapping[str, str], way_out: str) -> None:
    """Raises `StorageError` for a file that has changed since it was written."""
    for name, was in known.items():
        if how := describe_difference(folder / name, was):
            raise StorageError(
                f"{folder / name} is not as the run wrote it ({how}); put it back as it was, or "
                f"{way_out}"
            )


def first_change(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first file whose digests differ, as text; empty if there is none."""
    for name in dict.fromkeys([*before, *now]):
        if before.get(name) != now.get(name):
            how = "is gone" if name not in now else "is new" if name not in before else "changed"
            return f"{name} {how}"
    return ""


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object together with a digest of itself."""
    return {**value, _SEAL: _seal(value)}


def unsealed(value: Any) -> dict[str, Any] | None:
    """The object inside a sealed one; None if it has changed. An object without a digest is
    accepted as it is.
    """
    if not isinstance(value, dict):
        return None
    known = value.pop(_SEAL, None)
    return value if known in (None, _seal(value)) else None


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object together with a digest of itself, as `write_json` writes it."""
    write_json(path, sealed(value))


def read_sealed(path: Path, way_out: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote. Raises `StorageError` if the file is broken or has
    changed.
    """
    value = unsealed(read_json(path, f"put it back as it was, or {way_out}"))
    if value is None:
        raise StorageError(
            f"{path} is not as the run wrote it (its digest is wrong); put it back as it was, or "
            f"{way_out}"
        )
    return value


def _seal(value: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
