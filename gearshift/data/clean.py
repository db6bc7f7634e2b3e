"""Cleaning: mend the text, drop what is empty, twice there, or of the wrong length; and say how
much of each.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ftfy
from pydantic import Field

from gearshift.runtime.config import Config

# Zero-width characters and controls, but tab and newline, and but the joiners that scripts and
# emoji need.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")


class CleanConfig(Config):
    """What cleaning does."""

    fix_text: bool = True
    """Mend mojibake and the like (ftfy); straight quotes stay straight, curly ones curly."""
    strip: bool = True
    """Take white space off the ends, unify line ends, drop invisible characters."""
    drop_empty: bool = True
    """Drop rows in which a text is empty."""
    drop_duplicates: bool = True
    """Drop rows that are, once cleaned, exactly an earlier one."""
    min_chars: int = Field(0, ge=0)
    """Drop rows with fewer characters in all."""
    max_chars: int | None = Field(None, ge=1)
    """Drop rows with more characters in all."""


@dataclass(frozen=True, slots=True)
class CleanReport:
    """How many rows came, were kept, and were dropped for what."""

    rows: int
    kept: int
    changed: int
    empty: int
    duplicate: int
    length: int

    def __str__(self) -> str:
        dropped = (
            f"{self.empty} empty, {self.duplicate} duplicate, {self.length} of the wrong length"
        )
        return f"{self.kept} of {self.rows} rows kept ({self.changed} mended; dropped {dropped})"


def clean(
    rows: Sequence[dict[str, Any]], config: CleanConfig
) -> tuple[list[dict[str, Any]], CleanReport]:
    """The cleaned rows, and what was done. Newlines and indentation inside a text stay."""
    kept: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    changed = empty = duplicate = length = 0
    for row in rows:
        mended = _mend(row, config)
        texts = _texts(mended)
        size = sum(map(len, texts))
        digest = hashlib.blake2b(
            json.dumps(mended, sort_keys=True, default=str).encode(), digest_size=16
        ).digest()
        if config.drop_empty and (not texts or not all(map(str.strip, texts))):
            empty += 1
        elif config.drop_duplicates and digest in seen:
            duplicate += 1
        elif size < config.min_chars or (config.max_chars is not None and size > config.max_chars):
            length += 1
        else:
            changed += mended != row
            kept.append(mended)
        seen.add(digest)
    return kept, CleanReport(len(rows), len(kept), changed, empty, duplicate, length)


def _mend(value: Any, config: CleanConfig) -> Any:
    if isinstance(value, dict):
        return {key: _mend(inner, config) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mend(inner, config) for inner in value]
    if not isinstance(value, str):
        return value
    if config.fix_text:
        value = ftfy.fix_text(value, uncurl_quotes=False)
    if config.strip:
        value = _INVISIBLE.sub("", value.replace("\r\n", "\n").replace("\r", "\n")).strip()
    return value


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        # Alpaca's `input` is empty where the instruction says all.
        return [t for key, inner in value.items() if key != "input" or inner for t in _texts(inner)]
    if isinstance(value, list):
        return [t for inner in value for t in _texts(inner)]
    return [value] if isinstance(value, str) else []
