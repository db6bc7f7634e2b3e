"""The ecosystem's row formats, and the few records that stages learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NoReturn, TypeVar

from gearshift.data.columns import (
    ALPACA,
    BESIDE,
    answer,
    answers,
    asked,
    boolean,
    conversation,
    number,
    options,
    refuse_unsaid,
    refuse_unused,
    with_system,
)
from gearshift.data.given import Row, given
from gearshift.data.messages import string
from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.types import Message


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
        raise type(error)(f"{where}: {one_line(str(error), 1000)}") from error.__cause__


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
        used: tuple[str, ...] = ("messages" if "messages" in row else "conversations",)
        messages = conversation(row)
    elif "prompt" in row and "completion" in row:
        used = ("prompt", "completion")
        before = [{**m, "train": False} if answers(m) else m for m in asked(row, "prompt")]
        messages = [*before, *answer(row["completion"], "completion")]
    elif "instruction" in row and "output" in row:
        used = (*ALPACA, "output")
        words = answer(string(row["output"], "output"), "output")
        messages = [*asked(row, "instruction"), *words]
    elif "text" in row:
        refuse_unused(row, BESIDE)
        refuse_unsaid(row, ("text",))
        return TextExample(string(row["text"], "text"))
    else:
        _unknown(
            row, "text; messages; prompt and completion; conversations; instruction and output"
        )
    refuse_unsaid(row, used)
    if not any(map(answers, messages)):
        raise DataError(
            "the conversation has no assistant message to learn from; add one or drop the row."
        )
    if answers(messages[0]):
        raise DataError(
            "the conversation begins with the assistant; put a user message first or drop the row."
        )
    untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
    if all(i in untrained for i, m in enumerate(messages) if answers(m)):
        raise DataError("no answer of the conversation is to be trained; drop the row.")
    return ChatExample([_untold(m) for m in messages], options(row), untrained)


@_located
def to_prompt(row: Row) -> PromptExample:
    """From `prompt` (text or messages), `messages`, ShareGPT or Alpaca; of a conversation that ends
    with an answer, what comes before it. Every other column is kept. Raises `DataError`.
    """
    if not {"prompt", "messages", "conversations", "instruction"} & set(row):
        _unknown(row, "prompt; messages; conversations; instruction")
    if "prompt" in row:
        used, messages = {"prompt"}, asked(row, "prompt")
    elif {"messages", "conversations"} & set(row):
        used, messages = {"messages", "conversations", "functions"}, conversation(row)
    else:
        used, messages = set(ALPACA), asked(row, "instruction")
    if answers(messages[-1]):
        messages = messages[:-1]
    if not messages or answers(messages[-1]):
        raise DataError("there is no prompt before the assistant's words; drop the row.")
    used |= set(BESIDE) - {"functions"}
    columns = {k: v for k, v in row.items() if k not in used}
    return PromptExample([_untold(m) for m in messages], columns, options(row))


@_located
def to_preference(row: Row) -> PreferenceExample:
    """From `prompt`/`chosen`/`rejected`, or `chosen`/`rejected` conversations that share all but
    the last message.

    Raises `DataError`.
    """
    return _pair(row)


def _pair(row: Row) -> PreferenceExample:
    if "chosen" not in row or "rejected" not in row:
        _unknown(row, "prompt, chosen and rejected; chosen and rejected conversations")
    both = [answer(row[key], key) for key in ("chosen", "rejected")]
    before = both[0][:-1]
    asks = ("prompt", "instruction", "conversations", "messages")
    if before and not answers(before[0]) and before == both[1][:-1]:
        used, prompt = ("chosen", "rejected"), with_system(before, row)
    elif column := next((name for name in asks if name in row), None):
        prompt = asked(row, column)
        used = (*(ALPACA if column == "instruction" else (column,)), "chosen", "rejected")
        if any(len(side) != 1 for side in both):
            raise DataError(
                "chosen and rejected must each be one assistant message after the prompt, or "
                "conversations that differ in their last message only."
            )
    else:
        if any(isinstance(row[key], str) for key in ("chosen", "rejected")):
            raise DataError(
                "chosen and rejected are texts without a `prompt`; add one, or give conversations."
            )
        raise DataError(
            "chosen and rejected must be conversations that differ in their last message only."
        )
    refuse_unsaid(row, used)
    chosen, rejected = (_one(side[-1]) for side in both)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; drop the row.")
    prompt = [_untold(m) for m in prompt]
    margin = number(row.get("margin", 0.0), "margin")
    return PreferenceExample(prompt, chosen, rejected, margin, options(row))


@_located
def to_judged(row: Row) -> PreferenceExample | JudgedExample:
    """From `prompt`/`completion`/`label` (true: a good answer), or a pair. Raises `DataError`."""
    if {"chosen", "rejected"} <= set(row):
        return _pair(row)
    if not {"prompt", "completion", "label"} <= set(row):
        _unknown(row, "prompt, completion and label; prompt, chosen and rejected")
    refuse_unsaid(row, ("prompt", "completion"))
    good = boolean(row["label"], "label")
    said = answer(row["completion"], "completion")
    if len(said) != 1:
        raise DataError("completion must be one assistant message after the prompt.")
    prompt = [_untold(m) for m in asked(row, "prompt")]
    return JudgedExample(prompt, _one(said[0]), good, options(row))


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
    refuse_unsaid(row, ("prompt", "completions"))
    prompt = [_untold(m) for m in asked(row, "prompt")]
    right = [boolean(label, "labels") for label in labels]
    return StepsExample(prompt, texts, right, options(row))


def _unknown(row: Row, accepted: str) -> NoReturn:
    keys = one_line(", ".join(list(map(str, row))[:50]), 200) or "none"
    raise DataError(f"the keys are {keys}; accepted are: {accepted}.")


def _untold(message: Message) -> Message:
    """The message without its flag, which no template reads."""
    return {key: value for key, value in message.items() if key != "train"}


def _one(message: Message) -> str | Message:
    """An answer that is compared or judged: its text, where it is no more than that."""
    if "train" in message:
        raise DataError("an answer that is compared is flagged not to be trained; drop the row.")
    return message["content"] if set(message) == {"role", "content"} else message
