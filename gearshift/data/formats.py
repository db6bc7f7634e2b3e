"""The ecosystem's row formats, and the few records that stages learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NoReturn, TypeVar

from gearshift.data.given import Row, given
from gearshift.data.messages import (
    as_list,
    read_message,
    read_messages,
    read_tools,
    show,
    string,
)
from gearshift.errors import DataError
from gearshift.types import Message

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")


class SourceRow(dict[str, Any]):
    """A row that knows where it stands (`data.jsonl, line 3`), so that an error can say it."""

    __slots__ = ("raw", "where")

    def __init__(self, columns: Row, where: str, raw: Row | None = None) -> None:
        """`raw`: the row as its file has it, where the columns were cleaned since."""
        super().__init__(columns)
        self.where = where
        self.raw: Row = columns if raw is None else raw


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text, all of it trained. `where`, here and below, is where its row stands."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; the assistant's messages are trained.

    `options`, here and below: what the chat template gets besides, `tools` and others.
    """

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    """The places of answers that are not trained."""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """Something to answer, and the columns that rewards may read."""

    prompt: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A better and a worse answer: a text, or a message with more than that."""

    prompt: list[Message]
    chosen: str | Message
    rejected: str | Message
    margin: float = 0.0
    """By how much the better one should win."""
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class JudgedExample:
    """An answer, and whether it is a good one."""

    prompt: list[Message]
    completion: str | Message
    good: bool
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class StepsExample:
    """An answer in steps, and whether each is right."""

    prompt: list[Message]
    steps: list[str]
    labels: list[bool]
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Errors about data, raised in here, begin with where the row stands."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{where}: {error}") from error.__cause__


Record = TypeVar(
    "Record",
    ChatExample | TextExample,
    PromptExample,
    PreferenceExample,
    PreferenceExample | JudgedExample,
    StepsExample,
)


def _located(convert: Callable[[Row], Record]) -> Callable[[Row], Record]:
    """The conversion, its errors and its record saying where the row stands."""

    @wraps(convert)
    def located(row: Row) -> Record:
        where = getattr(row, "where", "")
        with at(where or "A row"):
            return replace(convert(given(row)), where=where)

    return located


@_located
def to_supervised(row: Row) -> ChatExample | TextExample:
    """From `messages`, `prompt`/`completion`, ShareGPT, Alpaca or `text`. Raises `DataError`."""
    if "messages" in row or "conversations" in row:
        messages = _conversation(row)
    elif "prompt" in row and "completion" in row:
        asked = [{**m, "train": False} if _answers(m) else m for m in _prompt(row)]
        messages = [*asked, *_answer(row["completion"], "completion")]
    elif "instruction" in row and "output" in row:
        messages = [*_prompt(row), *_answer(string(row["output"], "output"), "output")]
    elif "text" in row:
        _refuse_unused(row, ("system", "tools", "chat_template_kwargs"))
        _options(row)
        return TextExample(string(row["text"], "text"))
    else:
        _unknown(
            row, "text; messages; prompt and completion; conversations; instruction and output"
        )
    if not any(map(_answers, messages)):
        raise DataError(
            "the conversation has no assistant message to learn from; add one or drop the row."
        )
    if _answers(messages[0]):
        raise DataError(
            "the conversation begins with the assistant; put a user message first or drop the row."
        )
    untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
    if all(i in untrained for i, m in enumerate(messages) if _answers(m)):
        raise DataError("no answer of the conversation is to be trained; drop the row.")
    return ChatExample([_untold(m) for m in messages], _options(row), untrained)


@_located
def to_prompt(row: Row) -> PromptExample:
    """From `prompt` (text or messages), `messages`, ShareGPT or Alpaca; of a conversation that ends
    with an answer, what comes before it. Every other column is kept. Raises `DataError`.
    """
    if not {"prompt", "messages", "conversations", "instruction"} & set(row):
        _unknown(row, "prompt; messages; conversations; instruction")
    if "prompt" in row:
        used, messages = {"prompt"}, _prompt(row)
    elif {"messages", "conversations"} & set(row):
        used, messages = {"messages", "conversations"}, _conversation(row)
    else:
        used, messages = {"instruction", "input", "history"}, _prompt(row)
    if _answers(messages[-1]):
        messages = messages[:-1]
    if not messages or _answers(messages[-1]):
        raise DataError("there is no prompt before the assistant's words; drop the row.")
    used |= {"system", "tools", "chat_template_kwargs"}
    columns = {k: v for k, v in row.items() if k not in used}
    return PromptExample([_untold(m) for m in messages], columns, _options(row, media=True))


@_located
def to_preference(row: Row) -> PreferenceExample:
    """From `prompt`/`chosen`/`rejected`, or `chosen`/`rejected` conversations that share all but
    the last message.

    Raises `DataError`.
    """
    if "chosen" not in row or "rejected" not in row:
        _unknown(row, "prompt, chosen and rejected; chosen and rejected conversations")
    both = [_answer(row[key], key) for key in ("chosen", "rejected")]
    if {"prompt", "instruction", "conversations"} & set(row):
        prompt = _prompt(row)
        # Some sets repeat the prompt in front of each side.
        sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in both]
        if any(len(side) != 1 for side in sides):
            raise DataError(
                "chosen and rejected must each be one assistant message after the prompt."
            )
    else:
        if any(isinstance(row[key], str) for key in ("chosen", "rejected")):
            raise DataError(
                "chosen and rejected are texts without a `prompt`; add one, or give conversations."
            )
        prompt, sides = _with_system(both[0][:-1], row), [both[0][-1:], both[1][-1:]]
        if not both[0][:-1] or both[0][:-1] != both[1][:-1]:
            raise DataError(
                "chosen and rejected must be conversations that differ in their last message only."
            )
    chosen, rejected = (_one(side[0]) for side in sides)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; drop the row.")
    prompt = [_untold(m) for m in prompt]
    return PreferenceExample(
        prompt, chosen, rejected, _number(row.get("margin", 0.0), "margin"), _options(row)
    )


@_located
def to_judged(row: Row) -> PreferenceExample | JudgedExample:
    """From `prompt`/`completion`/`label` (true: a good answer), or a pair. Raises `DataError`."""
    if "label" not in row or {"chosen", "rejected"} <= set(row):
        return to_preference(row)
    if "prompt" not in row or "completion" not in row:
        _unknown(row, "prompt, completion and label; prompt, chosen and rejected")
    good = _boolean(row["label"], "label")
    answer = _answer(row["completion"], "completion")
    if len(answer) != 1:
        raise DataError("completion must be one assistant message after the prompt.")
    prompt = [_untold(m) for m in _prompt(row)]
    return JudgedExample(prompt, _one(answer[0]), good, _options(row))


@_located
def to_steps(row: Row) -> StepsExample:
    """From `prompt`/`completions`/`labels`: the steps of one answer and whether each is right.

    Raises `DataError`.
    """
    if not {"prompt", "completions", "labels"} <= set(row):
        _unknown(row, "prompt, completions (a list of steps) and labels")
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise DataError("completions and labels must be lists of the same length.")
    if not steps:
        raise DataError("an answer needs at least one step.")
    texts = [string(step, "completions") for step in steps]
    prompt = [_untold(m) for m in _prompt(row)]
    right = [_boolean(label, "labels") for label in labels]
    return StepsExample(prompt, texts, right, _options(row))


def _unknown(row: Row, accepted: str) -> NoReturn:
    raise DataError(f"the keys are {', '.join(map(str, row)) or 'none'}; accepted are: {accepted}.")


def _answers(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _untold(message: Message) -> Message:
    """The message without its flag, which no template reads."""
    return {key: value for key, value in message.items() if key != "train"}


def _one(message: Message) -> str | Message:
    """An answer that is compared or judged: its text, where it is no more than that."""
    if "train" in message:
        raise DataError("an answer that is compared is flagged not to be trained; drop the row.")
    return message["content"] if set(message) == {"role", "content"} else message


def _options(row: Row, media: bool = False) -> dict[str, Any]:
    """What the chat template gets besides the messages. `media`: columns of pictures and the like
    are the user's own.
    """
    if not media:
        alpaca = "instruction" in row and not {"messages", "conversations", "prompt"} & set(row)
        _refuse_unused(row, _MEDIA if alpaca else (*_MEDIA, "input", "history"))
    options = row.get("chat_template_kwargs", {})
    if not isinstance(options, Mapping):
        raise DataError(f"`chat_template_kwargs` is {show(options)}; it must be an object.")
    tools = {"tools": read_tools(row["tools"])} if row.get("tools") else {}
    return {**tools, **options}


def _refuse_unused(row: Row, columns: Sequence[str]) -> None:
    """Raises `DataError` if the row has one of these, which its format does not use."""
    if unused := [column for column in columns if column in row]:
        raise DataError(
            f"`{unused[0]}` is not used with the row's other columns; take the column out."
        )


def _conversation(row: Row) -> list[Message]:
    key = "messages" if "messages" in row else "conversations"
    value = row[key]
    return _with_system(read_messages(value, key), row)


def _prompt(row: Row) -> list[Message]:
    """What is asked: `prompt`, Alpaca's columns, or ShareGPT's turns; without an answer."""
    if "prompt" in row:
        value = row["prompt"]
        single = isinstance(value, str)
        messages = [_user(string(value, "prompt"))] if single else read_messages(value, "prompt")
    elif "instruction" in row:
        parts = [string(row[k], k) for k in ("instruction", "input") if k in row]
        messages = [*_history(row.get("history", [])), _user("\n\n".join(parts))]
    else:
        messages = read_messages(row["conversations"], "conversations")
    if _answers(messages[-1]):
        raise DataError("the prompt ends with the assistant's words; move them to `completion`.")
    return _with_system(messages, row)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _history(value: Any) -> list[Message]:
    """Alpaca's earlier turns: pairs of what was asked and answered."""
    messages: list[Message] = []
    for pair in as_list(value, "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"`history` has {show(pair)}; it must hold pairs of question, answer.")
        messages += [_user(string(pair[0], "history"))]
        messages += [{"role": "assistant", "content": string(pair[1], "history")}]
    return messages


def _with_system(messages: list[Message], row: Row) -> list[Message]:
    """With the system message of a column beside them."""
    if "system" not in row:
        return messages
    system: Message = {"role": "system", "content": string(row["system"], "system")}
    if not messages or messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise DataError("`system` is not the conversation's own system message; take one out.")
    return messages


def _answer(value: Any, key: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant", "content": string(value, key)}]
    messages = (
        [read_message(value, key)] if isinstance(value, Mapping) else read_messages(value, key)
    )
    if not _answers(messages[-1]):
        raise DataError(f"`{key}` does not end with an assistant message; mend or drop the row.")
    return messages


def _boolean(value: Any, key: str) -> bool:
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    known = words.get(str(value).lower()) if isinstance(value, str | int | float) else None
    if known is None:
        raise DataError(f"`{key}` is {show(value)}; it must be true or false.")
    return known


def _number(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"`{key}` is {show(value)}; it must be a number.")
    return number
