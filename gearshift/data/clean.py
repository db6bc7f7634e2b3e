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

from gearshift.data.formats import COLUMNS, SourceRow, lacks_words, with_lists
from gearshift.runtime.config import Config

# Zero-width characters, controls and halves of surrogate pairs, but tab and newline, and but the
# joiners that scripts and emoji need.
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\A\s*\n")
# Full-width punctuation is how Chinese and Japanese are written, and curly quotes are no mistake.
_FIXER = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, explain=False)


class CleanConfig(Config):
    """What cleaning does."""

    fix_text: bool = True
    """Mend mojibake and the like (ftfy); quotes and full-width characters stay as they are."""
    strip: bool = True
    """Take white space off the ends, unify line ends, drop invisible characters. The first line of
    several keeps its indentation.
    """
    drop_empty: bool = True
    """Drop rows in which a text that must be read or learned is empty or null, or is in other rows
    of the source only. A system message or a tool's result may be empty."""
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
    rows: Sequence[dict[str, Any]], config: CleanConfig, answered: bool = False
) -> tuple[list[dict[str, Any]], CleanReport]:
    """The cleaned rows, and what was done. Newlines and indentation inside a text stay.

    `answered`: a row that only asks is empty.
    """
    columns = frozenset(key for row in rows for key in row)
    kept: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    changed = empty = duplicate = length = 0
    for row in rows:
        read = with_lists(row)
        mended = _mend(read, config)
        learned = {k: v for k, v in mended.items() if k in COLUMNS and (k != "input" or v)}
        leaves = _leaves(learned or mended)
        texts = [leaf for leaf in leaves if isinstance(leaf, str)]
        size = sum(map(len, texts))
        digest = hashlib.blake2b(
            json.dumps(mended, sort_keys=True, default=str).encode(), digest_size=16
        ).digest()
        if config.drop_empty and lacks_words(mended, columns, answered):
            empty += 1
        elif config.drop_duplicates and digest in seen:
            duplicate += 1
        elif size < config.min_chars or (config.max_chars is not None and size > config.max_chars):
            length += 1
        else:
            changed += mended != read
            kept.append(SourceRow(mended, row.where) if isinstance(row, SourceRow) else mended)
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
        value = ftfy.fix_text(value, _FIXER)
    if config.strip:
        value = _INVISIBLE.sub("", value.replace("\r\n", "\n").replace("\r", "\n")).rstrip()
        value = _BLANK_LINES.sub("", value)
        # Code that lost only its first indentation would be broken code.
        value = value if "\n" in value else value.lstrip()
    return value


def _leaves(value: Any) -> list[Any]:
    """What a row says: every value in it but nulls, and but who speaks where something is said."""
    if isinstance(value, dict):
        said = {k: inner for k, inner in value.items() if k not in ("role", "from")}
        return [x for inner in (said or value).values() for x in _leaves(inner)]
    if isinstance(value, list):
        return [x for inner in value for x in _leaves(inner)]
    return [] if value is None else [value]
