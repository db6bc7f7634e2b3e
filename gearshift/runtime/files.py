"""Writing the files of a run: what the disk refuses is one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gearshift.errors import StorageError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `StorageError` for whatever goes wrong inside with a disk or a folder's rights."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        what = getattr(error, "filename", None) or path
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StorageError(
            f"{what} cannot be written ({reason}); free some space, or give another folder."
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write by way of a temporary file: a reader sees the old text or the new one, never half."""
    partial = path.with_suffix(path.suffix + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON in the same way."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
