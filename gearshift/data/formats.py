"""The row formats of the ecosystem, and the few records that stages learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NoReturn, TypeVar

from gearshift.data.columns import (
    ALPACA_PROMPT,
    CONTEXT_COLUMNS,
    answer_messages,
    conversation,
    is_answer,
    prompt_messages,
    refuse_unused,
    refuse_unused_text,
    template_options,
    to_boolean,
    to_number,
    with_system,
)
from gearshift.data.messages import to_text
from gearshift.data.rows import Row, filled_columns
from gearshift.errors import DataError
from gearshift.runtime.terminal import one_line
from gearshift.types import Message


class SourceRow(dict[str, Any]):
    """A row that knows its place (`data.jsonl, line 3`), so that an error can name it."""

    __slots__ = ("raw", "where")

    def __init__(self, columns: Row, where: str, raw: Row | None = None) -> None:
        """`raw` is the row as the file has it, if the columns have been cleaned."""
        super().__init__(columns)
        self.where = where
        self.raw: Row = columns if raw is None else raw


@dataclass(frozen=True, slots=True)
class TextExample:
    """A plain text; all of it is trained. `where`, here and below, is the place of its row."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; the assistant's messages are trained.

    `options`, here and below, are the arguments of the chat template besides the messages, for
    example `tools`.
    """

    messages: list[Message]
    options: dict[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    """The positions of answers that are not trained."""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt, and the columns that rewards may read."""

    prompt: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A better and a worse answer; each is a text, or a message with more than a text."""

    prompt: list[Message]
    chosen: str | Message
    rejected: str | Message
    margin: float = 0.0
    """How clearly the better answer should win."""
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class UnpairedExample:
    """An answer, and whether it is good."""

    prompt: list[Message]
    completion: str | Message
    good: bool
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class StepwiseExample:
    """An answer in steps, and whether each step is right."""

    prompt: list[Message]
    steps: list[str]
    labels: list[bool]
    options: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Errors about data inside begin with the place of the row."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{where}: {one_line(str(error), 1000)}") from error.__cause__


Record = TypeVar(
    "Record",
    ChatExample | TextExample,
    PromptExample,
    PreferenceExample,
    PreferenceExample | UnpairedExample,
    StepwiseExample,
)


def _located(convert: Callable[[Row], Record]) -> Callable[[Row], Record]:
    """The conversion, with the row's place in its errors and in its record."""

    @wraps(convert)
    def located(row: Row) -> Record:
        where = getattr(row, "where", "")
        with errors_at(where or "A row"):
            return replace(convert(filled_columns(row)), where=where)

    return located


@_located
def to_supervised(row: Row) -> ChatExample | TextExample:
    """Read `messages`, `prompt`/`completion`, ShareGPT, Alpaca or `text`. Raises `DataError`."""
    if "messages" in row or "conversations" in row:
        used: tuple[str, ...] = ("messages" if "messages" in row else "conversations",)
        messages = conversation(row)
    elif "prompt" in row and "completion" in row:
        used = ("prompt", "completion")
        before = [
            {**m, "train": False} if is_answer(m) else m for m in prompt_messages(row, "prompt")
        ]
        messages = [*before, *answer_messages(row["completion"], "completion")]
    elif "instruction" in row and "output" in row:
        used = (*ALPACA_PROMPT, "output")
        words = answer_messages(to_text(row["output"], "output"), "output")
        messages = [*prompt_messages(row, "instruction"), *words]
    elif "text" in row:
        refuse_unused(row, CONTEXT_COLUMNS)
        refuse_unused_text(row, ("text",))
        return TextExample(to_text(row["text"], "text"))
    else:
        _unknown(
            row, "text; messages; prompt and completion; conversations; instruction and output"
        )
    refuse_unused_text(row, used)
    if not any(map(is_answer, messages)):
        raise DataError(
            "the conversation has no assistant message to learn from; add one or drop the row."
        )
    if is_answer(messages[0]):
        raise DataError(
            "the conversation begins with the assistant; put a user message first or drop the row."
        )
    untrained = frozenset(i for i, m in enumerate(messages) if m.get("train") is False)
    if all(i in untrained for i, m in enumerate(messages) if is_answer(m)):
        raise DataError("no answer of the conversation is to be trained; drop the row.")
    return ChatExample([_without_flag(m) for m in messages], template_options(row), untrained)


@_located
def to_prompt(row: Row) -> PromptExample:
    """Read `prompt` (a text or messages), `messages`, ShareGPT or Alpaca; if a conversation ends
    with an answer, its prompt is what comes before. Every other column is kept. Raises `DataError`.
    """
    if not {"prompt", "messages", "conversations", "instruction"} & set(row):
        _unknown(row, "prompt; messages; conversations; instruction")
    if "prompt" in row:
        used, messages = {"prompt"}, prompt_messages(row, "prompt")
    elif {"messages", "conversations"} & set(row):
        used, messages = {"messages", "conversations", "functions"}, conversation(row)
    else:
        used, messages = set(ALPACA_PROMPT), prompt_messages(row, "instruction")
    if is_answer(messages[-1]):
        messages = messages[:-1]
    if not messages or is_answer(messages[-1]):
        raise DataError("there is no prompt before the assistant's words; drop the row.")
    used |= set(CONTEXT_COLUMNS) - {"functions"}
    columns = {k: v for k, v in row.items() if k not in used}
    return PromptExample([_without_flag(m) for m in messages], columns, template_options(row))


@_located
def to_preference(row: Row) -> PreferenceExample:
    """Read `prompt`/`chosen`/`rejected`, or `chosen`/`rejected` conversations that differ only in
    their last message.

    Raises `DataError`.
    """
    return _pair(row)


def _pair(row: Row) -> PreferenceExample:
    if "chosen" not in row or "rejected" not in row:
        _unknown(row, "prompt, chosen and rejected; chosen and rejected conversations")
    both = [answer_messages(row[key], key) for key in ("chosen", "rejected")]
    before = both[0][:-1]
    asks = ("prompt", "instruction", "conversations", "messages")
    if before and not is_answer(before[0]) and before == both[1][:-1]:
        used, prompt = ("chosen", "rejected"), with_system(before, row)
    elif column := next((name for name in asks if name in row), None):
        prompt = prompt_messages(row, column)
        used = (*(ALPACA_PROMPT if column == "instruction" else (column,)), "chosen", "rejected")
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
    refuse_unused_text(row, used)
    chosen, rejected = (_compared_answer(side[-1]) for side in both)
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; drop the row.")
    prompt = [_without_flag(m) for m in prompt]
    margin = to_number(row.get("margin", 0.0), "margin")
    return PreferenceExample(prompt, chosen, rejected, margin, template_options(row))


@_located
def to_unpaired(row: Row) -> PreferenceExample | UnpairedExample:
    """Read `prompt`/`completion`/`label` (true: a good answer), or a preference pair. Raises
    `DataError`.
    """
    if {"chosen", "rejected"} <= set(row):
        return _pair(row)
    if not {"prompt", "completion", "label"} <= set(row):
        _unknown(row, "prompt, completion and label; prompt, chosen and rejected")
    refuse_unused_text(row, ("prompt", "completion"))
    good = to_boolean(row["label"], "label")
    said = answer_messages(row["completion"], "completion")
    if len(said) != 1:
        raise DataError("completion must be one assistant message after the prompt.")
    prompt = [_without_flag(m) for m in prompt_messages(row, "prompt")]
    return UnpairedExample(prompt, _compared_answer(said[0]), good, template_options(row))


@_located
def to_stepwise(row: Row) -> StepwiseExample:
    """Read `prompt`/`completions`/`labels`: the steps of one answer, and whether each is right.

    Raises `DataError`.
    """
    if not {"prompt", "completions", "labels"} <= set(row):
        _unknown(row, "prompt, completions (a list of steps) and labels")
    steps, labels = row["completions"], row["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels):
        raise DataError("completions and labels must be lists of the same length.")
    if not steps:
        raise DataError("an answer needs at least one step.")
    texts = [to_text(step, "completions") for step in steps]
    refuse_unused_text(row, ("prompt", "completions"))
    prompt = [_without_flag(m) for m in prompt_messages(row, "prompt")]
    right = [to_boolean(label, "labels") for label in labels]
    return StepwiseExample(prompt, texts, right, template_options(row))


def _unknown(row: Row, accepted: str) -> NoReturn:
    keys = one_line(", ".join(list(map(str, row))[:50]), 200) or "none"
    raise DataError(f"the keys are {keys}; accepted are: {accepted}.")


def _without_flag(message: Message) -> Message:
    """The message without its `train` flag, which no template reads."""
    return {key: value for key, value in message.items() if key != "train"}


def _compared_answer(message: Message) -> str | Message:
    """An answer for a comparison: its text, if the message has nothing else."""
    if "train" in message:
        raise DataError("an answer that is compared is flagged not to be trained; drop the row.")
    return message["content"] if set(message) == {"role", "content"} else message
