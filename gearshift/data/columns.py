"""Reads a row's columns: its conversation, its prompt, an answer, and what accompanies them. A
column with content that no other column has is either used, or refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gearshift.data.messages import (
    read_message,
    read_messages,
    read_tools,
    show,
    to_list,
    to_text,
)
from gearshift.data.rows import Row
from gearshift.errors import DataError
from gearshift.types import Message

ALPACA_PROMPT = ("instruction", "input", "history")
"""The columns of Alpaca that make up the prompt."""
CONTEXT_COLUMNS = ("system", "system_prompt", "tools", "functions", "chat_template_kwargs")
"""The columns that accompany a conversation."""
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TEXT_COLUMNS = (
    "text", "messages", "conversations", "prompt", "completion", "instruction", "input", "output",
    "context",
)  # fmt: skip


def template_options(row: Row) -> dict[str, Any]:
    """The arguments of the chat template besides the messages. Raises `DataError`."""
    given = row.get("chat_template_kwargs", {})
    if not isinstance(given, Mapping):
        raise DataError(f"`chat_template_kwargs` is {show(given)}; it must be an object.")
    # `functions` is OpenAI's older name; in rows of other formats it may mean something else.
    names = ("tools", "functions") if "messages" in row else ("tools",)
    tools = [read_tools(row[name]) for name in names if row.get(name)]
    if len(tools) == 2 and tools[0] != tools[1]:
        raise DataError("`tools` and `functions` differ; take one out.")
    return {**({"tools": tools[0]} if tools else {}), **given}


def refuse_unused(row: Row, columns: Sequence[str]) -> None:
    """Raises `DataError` if the row has one of these columns, which its format does not use."""
    if unused := [column for column in columns if row.get(column) not in (None, [], {})]:
        raise DataError(
            f"`{unused[0]}` is not used with the row's other columns; take the column out."
        )


def refuse_unused_text(row: Row, used: Sequence[str]) -> None:
    """Raises `DataError` if a column outside `used` has text that none of the used columns has.

    Many data sets repeat the prompt, or the whole text, in a column of its own.
    """
    refuse_unused(row, [c for c in (*_MEDIA, "history") if c not in used])
    said = [text for column in used for text in _texts(row.get(column))]
    for column in _TEXT_COLUMNS:
        for text in _texts(row.get(column)) if column not in used else ():
            if not any(text in other or other in text for other in said):
                refuse_unused(row, (column,))


def _texts(value: Any) -> Iterator[str]:
    """The texts in a column, without white space."""
    if isinstance(value, str):
        yield from filter(None, ["".join(value.split())])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for key in ("content", "value", "text"):
            yield from _texts(value.get(key))


def conversation(row: Row) -> list[Message]:
    """The messages of `messages` or of ShareGPT's `conversations`. Raises `DataError`."""
    key = "messages" if "messages" in row else "conversations"
    return with_system(read_messages(row[key], key), row)


def prompt_messages(row: Row, *columns: str) -> list[Message]:
    """The prompt in the first of these columns that the row has: `prompt`, Alpaca's `instruction`,
    or the turns of a conversation, without an answer. Raises `DataError`.
    """
    column = next(column for column in columns if column in row)
    value = row[column]
    if column == "instruction":
        parts = [to_text(row[k], k) for k in ("instruction", "input") if k in row]
        messages = [*_history(row.get("history", [])), _user("\n\n".join(parts))]
    elif isinstance(value, str) and column == "prompt":
        messages = [_user(to_text(value, column))]
    else:
        messages = read_messages(value, column)
    if is_answer(messages[-1]):
        raise DataError("the prompt ends with the assistant's words; move them to `completion`.")
    return with_system(messages, row)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _history(value: Any) -> list[Message]:
    """Alpaca's earlier turns: pairs of a question and its answer."""
    messages: list[Message] = []
    for pair in to_list(value, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"`history` has {show(pair)}; it must hold pairs of question, answer.")
        messages += [_user(to_text(pair[0], "history"))]
        messages += [{"role": "assistant", "content": to_text(pair[1], "history")}]
    return messages


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages, with the system message of a column beside them. Raises `DataError` if they
    have a different one.
    """
    for column in ("system", "system_prompt"):
        if column not in row:
            continue
        system: Message = {"role": "system", "content": to_text(row[column], column)}
        if not messages or messages[0]["role"] != "system":
            messages = [system, *messages]
        elif messages[0] != system:
            raise DataError(
                f"`{column}` is not the conversation's own system message; take one out."
            )
    return messages


def answer_messages(value: Any, key: str) -> list[Message]:
    """The messages of an answer: of a text, a message, or a list of messages whose last one is an
    answer. Raises `DataError`.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": to_text(value, key)}]
    messages = (
        [read_message(value, key)] if isinstance(value, Mapping) else read_messages(value, key)
    )
    if not is_answer(messages[-1]):
        raise DataError(f"`{key}` does not end with an assistant message; correct or drop the row.")
    return messages


def is_answer(message: Message) -> bool:
    """Whether the message is the assistant's."""
    return bool(message["role"] == "assistant")


def to_boolean(value: Any, key: str) -> bool:
    """True or false, also as a number or a text. Raises `DataError`."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    known = words.get(str(value).lower()) if isinstance(value, str | int | float) else None
    if known is None:
        raise DataError(f"`{key}` is {show(value)}; it must be true or false.")
    return known


def to_number(value: Any, key: str) -> float:
    """A finite number, also as a text. Raises `DataError`."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"`{key}` is {show(value)}; it must be a number.")
    return found
