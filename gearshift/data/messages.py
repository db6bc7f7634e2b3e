"""Reads messages in the forms of OpenAI, ShareGPT and others, and returns one form: `role`,
`content`, and where they exist `name`, `tool_calls`, `tool_call_id` and `reasoning_content`. Any
other content of a message is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gearshift.data.rows import from_json
from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.types import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
}
"""For each role in a row, the role that templates know."""
FLAGS = ("weight", "train", "training", "loss")
"""Keys that say whether an answer is trained: 1 or true, 0 or false."""
_REASONING = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_CALLS = ("tool_calls", "function_call")
_KEYS = ("name", "tool_call_id", *_REASONING, *_CALLS, *FLAGS)


def read_messages(value: Any, key: str) -> list[Message]:
    """The messages of one column. A message that is not trained has `train: False`.

    System messages without words are left out. Raises `DataError`.
    """
    if not isinstance(value, list) or not value:
        text_or = "" if key in ("messages", "conversations") else "a text or "
        raise DataError(
            f"`{key}` is {show(value)}; it must be {text_or}a list of messages that is not empty."
        )
    messages = [read_message(item, key) for item in value]
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    if not messages:
        raise DataError(f"`{key}` has no words; fill it or drop the row.")
    return messages


def read_message(item: Any, key: str) -> Message:
    """One message, in OpenAI's or ShareGPT's form. Raises `DataError`."""
    if not isinstance(item, Mapping) or not ({"role"} <= set(item) or {"from"} <= set(item)):
        raise DataError(
            f"a message in `{key}` is {show(item)}; it must have `role` and `content`, or `from` "
            "and `value`."
        )
    speaker, words = ("role", "content") if "role" in item else ("from", "value")
    who = item[speaker]
    if not isinstance(who, str) or who not in ROLES:
        raise DataError(
            f"a message in `{key}` has {speaker} {show(who)}, which is no role; roles are "
            f"{', '.join(ROLES)}."
        )
    said = [name for name, value in item.items() if value not in (None, "", [], {})]
    if unknown := [name for name in said if name not in (speaker, words, *_KEYS)]:
        raise DataError(
            f"a message in `{key}` has `{one_line(unknown[0], 60)}`, which is not used; take it "
            f"out, or use one of {', '.join(_KEYS)}."
        )
    message: Message = {"role": ROLES[who], "content": ""}
    if who == "function_call":
        message["tool_calls"] = read_calls(item.get(words), words)
    else:
        message["content"], thought = _content(item.get(words), words)
        if thought:
            message[_REASONING[0]] = thought
    _add_rest(message, item)
    if _REASONING[0] in message and "</think>" in message["content"]:
        raise DataError("a message gives its reasoning twice, once in its words; take one out.")
    answers = message["role"] == "assistant"
    if not answers and (_REASONING[0] in message or "tool_calls" in message):
        raise DataError(
            f"a message in `{key}` of {who} has reasoning or calls, which only an assistant has."
        )
    optional = message["role"] in ("system", "tool") or {"tool_calls", _REASONING[0]} & set(message)
    if not message["content"] and not optional:
        raise DataError(
            f"a message in `{key}` is {show(dict(item))}; its `{words}` must be a text that is not "
            "empty."
        )
    return message


def _add_rest(message: Message, item: Mapping[str, Any]) -> None:
    """Add everything that a message has besides its words."""
    for name in ("name", "tool_call_id"):
        if item.get(name):
            message[name] = to_text(item[name], name)
    for name in _REASONING:
        if thought := item.get(name):
            if message.setdefault(_REASONING[0], thought) != thought:
                raise DataError(f"a message gives its reasoning twice; take `{name}` out.")
            to_text(thought, name)
    for name in _CALLS:
        if calls := item.get(name):
            if "tool_calls" in message:
                raise DataError(f"a message gives its calls twice; take `{name}` out.")
            message["tool_calls"] = read_calls(calls, name)
    trained = {_flag(item[name], name) for name in FLAGS if item.get(name) is not None}
    if len(trained) > 1:
        raise DataError(
            f"a message's flags ({', '.join(FLAGS)}) contradict each other; keep one of them."
        )
    if message["role"] == "assistant" and trained == {False}:
        message["train"] = False
    elif message["role"] != "assistant" and trained == {True}:
        raise DataError(
            f"a message of {message['role']} is to be trained; only answers are. Take the flag out."
        )


def _content(value: Any, key: str) -> tuple[str, str]:
    """(words, reasoning) of a text or a list of parts."""
    if value is None:
        return "", ""
    if isinstance(value, str):
        return value, ""
    if not isinstance(value, list):
        raise DataError(f"`{key}` is {show(value)}; it must be a text, or a list of text parts.")
    words, thoughts = [], []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS:
            words.append(to_text(part.get("text") or "", "text", empty=True))
        elif kind == "thinking":
            thoughts.append(to_text(part.get("thinking"), "thinking"))
        else:
            raise DataError(
                f"a part of `{key}` is {show(part)}; only text is read, no pictures or sounds."
            )
    return "".join(words), "\n".join(thoughts)


def read_calls(value: Any, key: str) -> list[dict[str, Any]]:
    """Tool calls in the form that templates expect: their arguments are an object."""
    value = parse_json(value, key) if isinstance(value, str) else value
    calls = []
    for item in value if isinstance(value, list) else [value]:
        function = item.get("function", item) if isinstance(item, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"a call in `{key}` is {show(item)}; it must have a function's `name`.")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = parse_json(arguments, "arguments") if arguments.strip() else {}
        if not isinstance(arguments, Mapping | None):
            raise DataError(f"`arguments` is {show(arguments)}; it must be an object.")
        call: dict[str, Any] = {"type": "function"}
        call |= {name: item[name] for name in ("id", "index") if item.get(name) is not None}
        call["function"] = {"name": function["name"], "arguments": dict(arguments or {})}
        other = set(item) - {"type", "id", "index", "function", "name", "arguments", "parameters"}
        if other:
            raise DataError(
                f"a call in `{key}` has `{one_line(min(other), 60)}`, which is not used; take it "
                "out."
            )
        calls.append(call)
    return calls


def read_tools(value: Any) -> list[dict[str, Any]]:
    """Tools as JSON schemas, from a list, or from a list as JSON text. Raises `DataError`."""
    value = parse_json(value, "tools") if isinstance(value, str) else value
    tools = [parse_json(t, "tools") if isinstance(t, str) else t for t in to_list(value, "tools")]
    for tool in tools:
        if (
            not isinstance(tool, Mapping)
            or not isinstance(tool.get("function", tool), Mapping)
            or not isinstance(tool.get("function", tool).get("name"), str)
        ):
            raise DataError(f"`tools` has {show(tool)}; each must be a function with a `name`.")
    return [
        dict(t) if "function" in t else {"type": "function", "function": dict(t)} for t in tools
    ]


def _flag(value: Any, key: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"`{key}` of a message is {show(value)}; it must be 0 or 1, true or false.")


def to_list(value: Any, key: str) -> list[Any]:
    """The value, if it is a list. Raises `DataError`."""
    if not isinstance(value, list):
        raise DataError(f"`{key}` is {show(value)}; it must be a list.")
    return value


def to_text(value: Any, key: str, empty: bool = False) -> str:
    """The value, if it is a text and not empty. Raises `DataError`."""
    if not isinstance(value, str) or not (value or empty):
        raise DataError(f"`{key}` is {show(value)}; it must be a text that is not empty.")
    return value


def parse_json(text: str, key: str) -> Any:
    """The value of a JSON text. Raises `DataError`."""
    try:
        return from_json(text)
    except ValueError as error:
        raise DataError(f"`{key}` is {show(text)}, which is not JSON ({error}).") from None


def show(value: Any) -> str:
    """A value as an error shows it."""
    return one_line(repr(value[:100] if isinstance(value, str) else value), 40)
