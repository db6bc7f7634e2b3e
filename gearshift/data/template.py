"""A tokenizer's chat template: the text that it makes of a conversation, and what it is given
beside the messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.errors import DataError
from gearshift.runtime.chat_arguments import bound_arguments, reads, template_source
from gearshift.types import Message

Options = Mapping[str, Any]
"""What a row gives a template beside its messages: `tools`, and further arguments by name."""
PROBE = "Qzprobe"
"""Words that no conversation has: where they come out shows what a template does with a text."""
_MARK = "Qzmark"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which templates read an answer's reasoning; rows are read into the first."""


def text_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
    asks: bool = False,
) -> str:
    """The template's text of a conversation; `asks`: with what asks for the assistant's words.

    Raises `DataError` if there is no template, or it refuses.
    """
    given = [with_reasoning(tokenizer, message) for message in messages]
    functions = [c["function"] for m in given for c in m.get("tool_calls") or ()]
    written = [str(f["arguments"]) for f in functions if isinstance(f.get("arguments"), dict)]
    written = [value for value in written if value != "{}"]
    try:
        text = _apply(tokenizer, given, options, asks)
        if not any(value in text for value in written):
            return text
    except DataError:
        if not written:
            raise
    # This template takes a call's arguments as JSON in a text, not as what JSON means.
    return _apply(tokenizer, [_with_json(message) for message in given], options, asks)


def has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks what the assistant says, as `{% generation %}`."""
    return re.search(r"{%-?\s*generation\b", template_source(tokenizer)) is not None


def marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Options | None
) -> tuple[list[int], list[int]]:
    """(token ids, mask) by these marks."""
    given = [with_reasoning(tokenizer, message) for message in messages]
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    out = _rendered(tokenizer, given, options, **how)
    return list(out["input_ids"]), list(out["assistant_masks"])


def check_said(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Options | None
) -> None:
    """Raises `DataError` if the template leaves out what the conversation or its options say.

    The reasoning of an answer is looked for where it is the last one: most templates drop it later.
    """
    options = options or {}
    if unread := [n for n in options if n != "tools" and not reads(tokenizer, n)]:
        raise DataError(f"the chat template does not read `{unread[0]}`; take it out of the row.")
    whole = _all_texts(tokenizer, messages, options)
    without = {**options, "tools": None}
    if options.get("tools") and whole == _all_texts(tokenizer, messages, without):
        raise DataError(left_out("`tools`"))
    for i, message in enumerate(messages):
        until = messages[: i + 1] if message["role"] == "assistant" else messages
        text = whole
        if len(until) < len(messages):
            text = _all_texts(tokenizer, until, options)
        for what, said, instead in _sayings(tokenizer, message):
            tried = [*messages[:i], instead, *until[i + 1 :]]
            if (said is None or squeezed(said) not in squeezed(text)) and not _shows(
                tokenizer, tried, options
            ):
                raise DataError(left_out(f"`{what}` of message {i + 1} ({message['role']})"))


def _all_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Options
) -> str:
    """The conversation, and what asks for its last answer: some templates write only there what
    comes before a question.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    before = text_of(tokenizer, asked, options, asks=True) if asked else ""
    return text_of(tokenizer, messages, options) + before


def _sayings(
    tokenizer: PreTrainedTokenizerBase, message: Message
) -> Iterator[tuple[str, str | None, Message]]:
    """What a message says: the key, the words if they come out as they are, and the message with
    others in their place.
    """
    for key in ("content", REASONING[0], "name"):
        said = message.get(key)
        if key == "content" and said and message["role"] == "assistant":
            said = said.split("</think>")[-1]
        if key == "name" and message["role"] == "tool":
            said = None  # the call names it
        if key == REASONING[0] and not _reasoning_keys(tokenizer):
            said = None  # it is a part of the content
        if said:
            yield key, said, {**message, key: _MARK}
    calls = message.get("tool_calls") or []
    for n, call in enumerate(calls):
        function = call["function"]
        others = [{**function, "name": _MARK}]
        if function.get("arguments"):
            others.append({**function, "arguments": {_MARK: _MARK}})
        for other in others:
            replaced = [*calls[:n], {**call, "function": other}, *calls[n + 1 :]]
            yield "tool_calls", None, {**message, "tool_calls": replaced}


def _shows(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Options
) -> bool:
    """Whether the mark in these messages comes out (or is not allowed there)."""
    try:
        return _MARK in _all_texts(tokenizer, messages, options)
    except DataError:
        return True


def squeezed(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def left_out(what: str) -> str:
    return (
        f"the chat template leaves out {what}; take it out of the row, or give the tokenizer a "
        "template that writes it."
    )


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None,
    asks: bool,
) -> str:
    return str(_rendered(tokenizer, messages, options, add_generation_prompt=asks, tokenize=False))


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None,
    **how: bool,
) -> Any:
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template; set tokenizer.chat_template and save it, "
            "or use `text` rows."
        )
    options = options or {}
    arguments = {**bound_arguments(tokenizer, options.get("tools")), **options}
    try:
        return tokenizer.apply_chat_template(list(messages), **how, **arguments)
    except Exception as error:  # a template's own raise_exception, or one that wants other fields
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"The chat template refuses this conversation: {reason}.") from error


def with_reasoning(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """The message with its reasoning under the keys that the template reads; before the content,
    where the template knows it as a part of that only.
    """
    reasoning = message.get(REASONING[0])
    if not reasoning:
        return message
    names = _reasoning_keys(tokenizer)
    rest = {key: value for key, value in message.items() if key != REASONING[0]}
    if names:
        return {**rest, **dict.fromkeys(names, reasoning)}
    if "</think>" in template_source(tokenizer):
        return {**rest, "content": f"<think>\n{reasoning}\n</think>\n\n{message['content']}"}
    raise DataError(left_out(f"`{REASONING[0]}`"))


def _reasoning_keys(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    source = template_source(tokenizer)
    return [name for name in REASONING if re.search(rf"""[.'"]{name}\b""", source)]


def _with_json(message: Message) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**c, "function": {**c["function"], "arguments": _json(c["function"].get("arguments"))}}
        for c in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value or {}, ensure_ascii=False)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pattern of those with a name (EOS and so on), and of those that are only added: Phi's
    `<|end|>`.
    """
    return _specials(tokenizer, len(tokenizer))


@lru_cache(16)
def _specials(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    """`size` tells apart what the tokenizer had before tokens were added to it."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"
