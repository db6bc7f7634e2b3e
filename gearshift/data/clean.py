"""Cleaning: repair texts, drop rows that are empty, duplicate, or of the wrong length, and count
what was done.
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

from gearshift.data.formats import SourceRow
from gearshift.data.messages import ROLES
from gearshift.data.rows import TEXT_COLUMNS, is_empty_row, parse_json_columns
from gearshift.data.text import replace_surrogates
from gearshift.runtime.config import Config
from gearshift.runtime.terminal import counted

_LONGEST = 1 << 20
"""Mojibake is looked for only in texts up to this many characters, because that takes a while for
each line.
"""
_BLANK_LINES = re.compile(r"\A(?:[ \t]*\n)+")
# Only certain mojibake is repaired: entities, escapes, ligatures, curly or full-width characters,
# zero-width characters and decomposed letters may all be right.
_FIXER = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_c1_controls=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_SPOKEN = frozenset(("content", "value", "text", "reasoning_content", "reasoning", "thinking"))
"""The keys of a message, or of a part of it, that contain its words."""
_DATA = [*(who for who, role in ROLES.items() if role == "tool"), "function_call"]
"""Roles whose words are data. It is a list, because a role in a row may be a value that cannot be
hashed.
"""


class CleanConfig(Config):
    """How the rows of a stage are cleaned before it learns from them."""

    fix_text: bool = True
    """Repair mojibake (with ftfy) in the columns that the stage learns from. Other columns and
    other characters stay as they are.
    """
    strip: bool = True
    """Remove a byte order mark and blank lines at the beginning of a text, and white space at its
    end; replace CR LF by newlines in a text whose lines all end with CR LF. Indentation stays."""
    drop_empty: bool = True
    """Drop rows in which a text that the stage needs is empty, null, or missing although other rows
    of the source have it. A system message or a tool's result may be empty.
    """
    drop_duplicates: bool = True
    """Drop rows that are exactly equal to an earlier row after cleaning."""
    min_chars: int = Field(default=0, ge=0)
    """How many characters a row must have in total; shorter rows are dropped."""
    max_chars: int | None = Field(default=None, ge=1)
    """How many characters a row may have in total; longer rows are dropped, and null keeps them
    all."""


@dataclass(frozen=True, slots=True)
class CleanReport:
    """How many rows there were, how many were kept, and why the others were dropped."""

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
        kept = f"{self.kept} of {counted(self.rows, 'row')} kept"
        return f"{kept} ({self.changed} repaired; dropped {dropped})"


def clean(
    rows: Sequence[dict[str, Any]], config: CleanConfig, answered: bool = False
) -> tuple[list[dict[str, Any]], CleanReport]:
    """The cleaned rows, and a report. Columns that the stage does not learn from stay as they are.

    With `answered`, a row that has only a prompt counts as empty.
    """
    columns = frozenset(key for row in rows for key in row)
    kept: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    changed = empty = duplicate = length = 0
    for row in rows:
        read = parse_json_columns(row)
        repaired = _repair_row(read, config)
        learned = {k: v for k, v in repaired.items() if k in TEXT_COLUMNS and (k != "input" or v)}
        leaves = _leaves(learned or repaired)
        texts = [leaf for leaf in leaves if isinstance(leaf, str)]
        size = sum(map(len, texts))
        digest = hashlib.blake2b(
            json.dumps(repaired, sort_keys=True, default=str).encode(), digest_size=16
        ).digest()
        if config.drop_empty and is_empty_row(repaired, columns, answered):
            empty += 1
        elif config.drop_duplicates and digest in seen:
            duplicate += 1
        elif size < config.min_chars or (config.max_chars is not None and size > config.max_chars):
            length += 1
        else:
            changed += repaired != read
            if isinstance(row, SourceRow):
                repaired = SourceRow(repaired, row.where, row)
            kept.append(repaired)
        seen.add(digest)
    return kept, CleanReport(len(rows), len(kept), changed, empty, duplicate, length)


def _repair_row(row: dict[str, Any], config: CleanConfig) -> dict[str, Any]:
    return {key: _mend(v, config) if key in TEXT_COLUMNS else v for key, v in row.items()}


def _mend(value: Any, config: CleanConfig) -> Any:
    """Clean a text, a list of texts, or messages; in a message, only its words."""
    if isinstance(value, str):
        return _mend_text(value, config)
    if isinstance(value, list):
        return [_mend(inner, config) for inner in value]
    if isinstance(value, dict) and value.get("role", value.get("from")) not in _DATA:
        return {key: _mend(v, config) if key in _SPOKEN else v for key, v in value.items()}
    return value


def _mend_text(text: str, config: CleanConfig) -> str:
    if config.fix_text and not text.isascii() and len(text) <= _LONGEST:
        fixed = ftfy.fix_text(text, _FIXER)
        # ftfy takes NEL, a line end, for the ellipsis of another encoding.
        text = text if fixed == text.replace("\x85", "\u2026") else fixed
    if config.strip:
        text = text.removeprefix("\ufeff")
        if text.count("\r\n") == text.count("\n"):
            text = text.replace("\r\n", "\n")
        text = _BLANK_LINES.sub("", text.rstrip())
    return replace_surrogates(text)


def _leaves(value: Any) -> list[Any]:
    """All values in a row except nulls, and except the role where a message has words."""
    if isinstance(value, dict):
        said = {k: inner for k, inner in value.items() if k not in ("role", "from")}
        return [x for inner in (said or value).values() for x in _leaves(inner)]
    if isinstance(value, list):
        return [x for inner in value for x in _leaves(inner)]
    return [] if value is None else [value]
