"""Raw rows, made the same for every kind of file: tables contain nulls, and CSV contains texts
only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gearshift.errors import DataError

Row = Mapping[str, Any]
TEXT_COLUMNS = frozenset((
    "text", "messages", "conversations", "prompt", "completion", "completions", "chosen",
    "rejected", "instruction", "input", "output", "system", "system_prompt", "history",
))  # fmt: skip
"""The columns that a stage learns from. All other columns are the user's own, or describe how to
read these.
"""
JSON_COLUMNS = (
    "messages", "conversations", "completions", "labels", "tools", "functions",
    "history", "chat_template_kwargs",
)  # fmt: skip
"""Columns with lists and objects; a file that has texts only contains them as JSON."""
MAX_NESTING = 100
"""How deep lists and objects may be nested; each level is one more recursion for their readers."""
_TOO_DEEP = f"it is nested more than {MAX_NESTING} deep"
_ANSWERED = (
    {"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"},
    {"instruction", "output"}, {"chosen", "rejected"}, {"prompt", "completions", "labels"},
)  # fmt: skip
_ASKED = ({"prompt"}, {"instruction"})
_MESSAGE = frozenset(("content", "tool_calls", "function_call"))
_OPTIONAL = frozenset(("system", "system_prompt", "input", "history"))


def from_json(text: str, **how: Any) -> Any:
    """The value of a JSON text. Raises `ValueError` if it is no JSON, or is nested too deeply for a
    row.
    """
    try:
        value = json.loads(text, **how)
        if text.count("[") + text.count("{") > MAX_NESTING:
            text_size(value)
    except (RecursionError, DataError):
        raise ValueError(_TOO_DEEP) from None
    return value


def text_size(value: Any) -> int:
    """How many characters all texts in it have. Raises `DataError` if it is nested too deeply for a
    row.
    """
    total, level = 0, [value]
    for _ in range(MAX_NESTING + 1):
        inside: list[Any] = []
        for outer in level:
            if isinstance(outer, str):
                total += len(outer)
            elif isinstance(outer, Mapping):
                inside += outer.values()
            elif isinstance(outer, list | tuple):
                inside += outer
        if not inside:
            return total
        level = inside
    raise DataError(f"{_TOO_DEEP}.")


def parse_json_columns(row: Row) -> dict[str, Any]:
    """The row with its lists and objects parsed, if its file has texts only. A text that is no JSON
    stays, and its reader refuses it by name.
    """
    row = dict(row)
    for key in {*JSON_COLUMNS, "prompt", "completion", "chosen", "rejected"} & set(row):
        text = row[key]
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
            try:
                value = from_json(text)
            except ValueError:
                continue
            # A prompt that looks like a list is one only if it contains messages.
            items = value if isinstance(value, list) else [value]
            if key in JSON_COLUMNS or all(map(_is_message, items)):
                row[key] = value
    return row


def _is_message(value: Any) -> bool:
    """Whether it is a message, and not another object that happens to have a role."""
    return isinstance(value, dict) and "role" in value and bool(_MESSAGE & set(value))


def filled_columns(row: Row) -> dict[str, Any]:
    """The columns of a row that have a value: null and empty columns are left out, and the JSON of
    lists and objects is parsed where the file has texts only.
    """
    kept = {key: _to_json_types(value) for key, value in parse_json_columns(row).items()}
    return {key: value for key, value in kept.items() if value is not None and value != ""}


def is_empty_row(row: Row, columns: frozenset[str], answered: bool) -> bool:
    """Whether a row has no words where it needs them: a text that it needs, or a message of user or
    assistant, is blank. A column that only other rows of its source (`columns`) have counts as
    blank. With `answered`, a prompt alone is not enough.
    """
    said = {key: value for key, value in filled_columns(row).items() if not _blank(value)}
    known = (columns & TEXT_COLUMNS) - _OPTIONAL
    if not said.keys() & known:  # blank; or of no known format, which its reader reports
        return not said or bool(row.keys() & known)
    formats = _ANSWERED if answered else (*_ANSWERED, *_ASKED)
    if not any(needed <= set(said) for needed in formats):
        return not known <= set(said)
    lists = [
        value for key, value in said.items() if key in TEXT_COLUMNS and isinstance(value, list)
    ]
    return any(_silent(message) for messages in lists for message in messages)


def _silent(message: Any) -> bool:
    if not isinstance(message, dict):
        return isinstance(message, str) and not _has_visible_text(message)
    who, words = (
        message.get("role", message.get("from")),
        message.get("content", message.get("value")),
    )
    others = {"role", "from", "content", "value"}
    blank = isinstance(words, str) and not _has_visible_text(words)
    return blank and who in ("user", "human", "assistant", "gpt") and not set(message) - others


def _blank(value: Any) -> bool:
    return not _has_visible_text(value) if isinstance(value, str) else value in ([], {})


def _has_visible_text(text: str) -> bool:
    """Whether the text has a visible character."""
    return any(letter.isprintable() for letter in text if letter != " ")


def _to_json_types(value: Any) -> Any:
    """Lists and objects in JSON's types, without the nulls that tables contain."""
    if isinstance(value, Mapping):
        return {k: _to_json_types(v) for k, v in value.items() if v is not None}
    if hasattr(value, "tolist"):  # an array
        value = value.tolist()
    if isinstance(value, list | tuple):
        pairs = [isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value]
        if pairs and all(pairs):  # a map from a table
            return _to_json_types(dict(value))
        return [_to_json_types(v) for v in value]
    return value
