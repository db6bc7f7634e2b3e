"""The user's row as the environment reads it, and as an example to learn from. This file must not
import models or trainers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gearshift.data.formats import ChatExample, SourceRow, to_prompt, to_supervised
from gearshift.data.messages import ROLES, show
from gearshift.data.rows import filled_columns
from gearshift.errors import DataError
from gearshift.rewards.functions import ARGUMENTS
from gearshift.types import Message

Row = dict[str, Any]


def prompt_row(row: Mapping[str, Any], system: str | None) -> Row:
    """A row as the environment reads it: the prompt as messages, and the reward's columns. Raises
    `DataError` that names the file and the row.
    """
    example = to_prompt(row)
    raw = getattr(row, "raw", row)
    columns = {}
    for column, value in example.columns.items():
        if column in ARGUMENTS:
            raise DataError(
                f"{getattr(row, 'where', 'A row')}: reward functions get something else as "
                f"`{column}`; rename the column."
            )
        # A reward reads the values exactly as the file has them.
        columns[column] = raw[column] if isinstance(value, str) else value
        try:
            json.dumps(columns[column], ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError):
            raise DataError(
                f"{getattr(row, 'where', 'A row')}: `{column}` is {show(value)}, which JSON cannot "
                "hold; make it a text or a finite number."
            ) from None
    return {
        **columns,
        "prompt": _with_system(example.prompt, system),
        **_options(example.options),
    }


def has_answer(row: Mapping[str, Any]) -> bool:
    """Whether the row says what to answer."""
    row = filled_columns(row)
    if "prompt" in row:
        return "completion" in row
    turns = row.get("messages") or row.get("conversations") or [{}]
    who = turns[-1].get("role", turns[-1].get("from"))
    return "output" in row or ROLES.get(who) == "assistant"


def labelled_row(row: Mapping[str, Any], system: str | None) -> Row:
    own = to_prompt(row).columns.keys() - {"completion", "output"}
    kept = {key: value for key, value in row.items() if key not in own}
    example = to_supervised(SourceRow(kept, getattr(row, "where", "A row")))
    assert isinstance(example, ChatExample)  # the row has a prompt
    messages = [
        {**message, "train": False} if i in example.untrained else message
        for i, message in enumerate(example.messages)
    ]
    return {"messages": _with_system(messages, system), **_options(example.options)}


def _options(options: Mapping[str, Any]) -> Row:
    """The columns of these template arguments, as a row has them."""
    rest = {name: value for name, value in options.items() if name != "tools"}
    columns = {"tools": options.get("tools"), "chat_template_kwargs": rest}
    return {name: value for name, value in columns.items() if value}


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
