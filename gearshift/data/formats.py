"""The ecosystem's row formats, and the few records that stages learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, NoReturn, TypeVar

from gearshift.errors import DataError
from gearshift.types import Message

Row = Mapping[str, Any]
_PARTS = (
    "prompt", "completion", "completions", "chosen", "rejected", "instruction", "input", "output",
)  # fmt: skip
COLUMNS = frozenset(("text", "messages", "conversations", *_PARTS))
"""The columns that hold what is read and learned; any other is the user's own."""
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


class SourceRow(dict[str, Any]):
    """A row that knows where it stands (`data.jsonl, line 3`), so that an error can say it."""

    __slots__ = ("where",)

    def __init__(self, columns: Row, where: str) -> None:
        super().__init__(columns)
        self.where = where


@dataclass(frozen=True, slots=True)
class TextExample:
    """Plain text, all of it trained. `where`, here and below, is where its row stands."""

    text: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation; the assistant's messages are trained."""

    messages: list[Message]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """Something to answer, and the columns that rewards may read."""

    prompt: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A better and a worse answer."""

    prompt: list[Message]
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much the better one should win."""
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class JudgedExample:
    """An answer, and whether it is a good one."""

    prompt: list[Message]
    completion: str
    good: bool
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class StepsExample:
    """An answer in steps, and whether each is right."""

    prompt: list[Message]
    steps: list[str]
    labels: list[bool]
    where: str = field(default="", compare=False)


@contextmanager
def at(where: str) -> Iterator[None]:
    """Errors about data, raised in here, begin with where the row stands."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error.__cause__


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
            return replace(convert(row), where=where)

    return located


@_located
def to_supervised(row: Row) -> ChatExample | TextExample:
    """From `messages`, `prompt`/`completion`, ShareGPT, Alpaca or `text`. Raises `DataError`."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = _sharegpt(row["conversations"])
    elif "prompt" in row and "completion" in row:
        messages = [*_prompt(row["prompt"]), *_answer(row["completion"], "completion")]
    elif "instruction" in row and "output" in row:
        messages = [_alpaca(row), _message("assistant", _string(row["output"], "output"))]
    elif "text" in row:
        return TextExample(_string(row["text"], "text"))
    else:
        _unknown(
            row, "text; messages; prompt and completion; conversations; instruction and output"
        )
    if not any(m["role"] == "assistant" for m in messages):
        raise DataError(
            "the conversation has no assistant message to learn from; add one or drop the row."
        )
    if messages[0]["role"] == "assistant":
        raise DataError(
            "the conversation begins with the assistant; put a user message first or drop the row."
        )
    return ChatExample(messages)


@_located
def to_prompt(row: Row) -> PromptExample:
    """From `prompt` (text or messages), `messages`, ShareGPT or Alpaca; of a conversation that ends
    with an answer, what comes before it. Every other column is kept. Raises `DataError`.
    """
    if "prompt" in row:
        used, messages = {"prompt"}, _prompt(row["prompt"])
    elif "messages" in row:
        used, messages = {"messages"}, _messages(row["messages"], "messages")
    elif "conversations" in row:
        used, messages = {"conversations"}, _sharegpt(row["conversations"])
    elif "instruction" in row:
        used, messages = {"instruction", "input"}, [_alpaca(row)]
    else:
        _unknown(row, "prompt; messages; conversations; instruction")
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise DataError("there is no prompt before the assistant's words; drop the row.")
    return PromptExample(messages, {k: v for k, v in row.items() if k not in used})


@_located
def to_preference(row: Row) -> PreferenceExample:
    """From `prompt`/`chosen`/`rejected`, or `chosen`/`rejected` conversations that share all but
    the last message.

    Raises `DataError`.
    """
    if "chosen" not in row or "rejected" not in row:
        _unknown(row, "prompt, chosen and rejected; chosen and rejected conversations")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" in row:
        sides = [_answer(chosen, "chosen"), _answer(rejected, "rejected")]
        prompt = _prompt(row["prompt"])
        # Some sets repeat the prompt in front of each side.
        sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
        if any(len(side) != 1 for side in sides):
            raise DataError(
                "chosen and rejected must each be one assistant message after the prompt."
            )
    else:
        if isinstance(chosen, str) or isinstance(rejected, str):
            raise DataError(
                "chosen and rejected are texts without a `prompt`; add one, or give conversations."
            )
        both = [_answer(chosen, "chosen"), _answer(rejected, "rejected")]
        prompt, sides = both[0][:-1], [both[0][-1:], both[1][-1:]]
        if not prompt or prompt != both[1][:-1]:
            raise DataError(
                "chosen and rejected must be conversations that differ in their last message only."
            )
    texts = [side[0]["content"] for side in sides]
    if texts[0] == texts[1]:
        raise DataError("chosen and rejected are the same; drop the row.")
    margin = row.get("margin")
    if margin is not None and not isinstance(margin, int | float):
        raise DataError(f"`margin` is {_show(margin)}; it must be a number.")
    return PreferenceExample(prompt, texts[0], texts[1], float(margin or 0.0))


@_located
def to_judged(row: Row) -> PreferenceExample | JudgedExample:
    """From `prompt`/`completion`/`label` (true: a good answer), or a pair. Raises `DataError`."""
    if "label" not in row:
        return to_preference(row)
    if "prompt" not in row or "completion" not in row:
        _unknown(row, "prompt, completion and label; prompt, chosen and rejected")
    if not isinstance(row["label"], bool | int) or row["label"] not in (0, 1):
        raise DataError(f"`label` is {_show(row['label'])}; it must be true (good) or false.")
    answer = _answer(row["completion"], "completion")
    if len(answer) != 1:
        raise DataError("completion must be one assistant message after the prompt.")
    return JudgedExample(_prompt(row["prompt"]), answer[0]["content"], bool(row["label"]))


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
    if not steps or any(label not in (0, 1) for label in labels):
        raise DataError("an answer needs at least one step, and labels are true or false.")
    texts = [_string(step, "completions") for step in steps]
    return StepsExample(_prompt(row["prompt"]), texts, [bool(label) for label in labels])


def _unknown(row: Row, accepted: str) -> NoReturn:
    raise DataError(f"the keys are {', '.join(map(str, row))}; accepted are: {accepted}.")


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"`{key}` is {_show(value)}; it must be a text that is not empty.")
    return value


def _alpaca(row: Row) -> Message:
    """The instruction and, below it, the input, which may be empty or missing."""
    given = row.get("input") or ""
    parts = [_string(row["instruction"], "instruction"), given and _string(given, "input")]
    return _message("user", "\n\n".join(filter(None, parts)))


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        return [_message("user", _string(value, "prompt"))]
    messages = _messages(value, "prompt")
    if messages[-1]["role"] == "assistant":
        raise DataError("the prompt ends with the assistant's words; move them to `completion`.")
    return messages


def _answer(value: Any, key: str) -> list[Message]:
    if isinstance(value, str):
        return [_message("assistant", _string(value, key))]
    messages = _messages(value, key)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"`{key}` does not end with an assistant message; mend or drop the row.")
    return messages


def _messages(value: Any, key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"`{key}` is {_show(value)}; it must be a list of messages that is not empty."
        )
    messages = []
    for item in value:
        if not isinstance(item, Mapping) or not {"role", "content"} <= set(item):
            raise DataError(
                f"a message in `{key}` is {_show(item)}; it must have `role` and `content`."
            )
        if item["role"] not in ROLES:
            raise DataError(
                f"a message in `{key}` has the role {_show(item['role'])}; "
                f"roles are {', '.join(ROLES)}."
            )
        messages.append(_message(item["role"], _string(item["content"], "content")))
    return messages


def _sharegpt(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"`conversations` is {_show(value)}; it must be a list that is not empty.")
    messages = []
    for item in value:
        if not isinstance(item, Mapping) or not {"from", "value"} <= set(item):
            raise DataError(
                f"a turn in `conversations` is {_show(item)}; it must have `from` and `value`."
            )
        if item["from"] not in list(_SHAREGPT):  # a list: what is given may not be hashable
            raise DataError(
                f"a turn in `conversations` is from {_show(item['from'])}; "
                f"it must be one of {', '.join(_SHAREGPT)}."
            )
        messages.append(_message(_SHAREGPT[item["from"]], _string(item["value"], "value")))
    return messages


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
