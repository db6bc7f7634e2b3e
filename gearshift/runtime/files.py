"""Reading and writing the files of a run. An error is one line that names the file. A file is
replaced as a whole, so it is never half written, even after a power failure.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from gearshift.errors import StorageError

UNFINISHED = ".writing-*"
"""The names of files that are being written; one that is left over belongs to a process that died.
"""


_FULL = "free some space, or give another folder"
_FORBIDDEN = "the folder is not writable for you; change its permissions, or give another one"
_WAYS_OUT = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or give another folder",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: "its disk is read-only; give another folder",
    None: _FULL,  # a library's error has no number
}


def cache_folder() -> Path:
    """The folder for what is made once for each machine: `$GEARSHIFT_CACHE`, or
    `~/.cache/gearshift`.
    """
    return Path(os.environ.get("GEARSHIFT_CACHE", Path.home() / ".cache" / "gearshift"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every error of the disk or of permissions inside this context into a `StorageError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        named = Path(str(getattr(error, "filename", None) or path))
        what = path if named.match(UNFINISHED) else named
        way_out = _WAYS_OUT.get(getattr(error, "errno", None), "give another folder")
        raise StorageError(f"{what} cannot be written ({_reason(error)}); {way_out}.") from error


@contextmanager
def reading(
    path: Path, way_out: str = "put it back as it was, or choose another run.dir."
) -> Iterator[None]:
    """Raises `StorageError` if a run's file is missing, cannot be read, or is broken."""
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read ({_reason(error)}); {way_out}") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's text: a reader sees the old text or the new one. If the text is the same,
    the file is not touched.
    """
    # JSON and YAML write what UTF-8 cannot hold, half a surrogate pair, as this escape too.
    content = text.encode("utf-8", errors="backslashreplace")
    partial = path.with_name(UNFINISHED.replace("*", uuid4().hex[:12]))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content:
            return
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `write_text` writes text."""
    write_text(path, _json_text(value))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return _json_text(value).encode("utf-8", errors="backslashreplace")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_json(
    path: Path, way_out: str = "put it back as it was, or choose another run.dir."
) -> dict[str, Any]:
    """The object in a run's JSON file. Raises `StorageError` if it holds anything else."""
    with reading(path, way_out):
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        return value


def digest(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems cannot sync a folder, but they can sync a file.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _reason(error: Exception) -> str:
    """The reason, in one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    return getattr(error, "strerror", None) or " ".join(str(error).split())
