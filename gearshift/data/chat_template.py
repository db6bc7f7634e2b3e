"""A tokenizer's chat template: the text that it makes of a conversation, and its other
arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.data.messages import read_calls
from gearshift.data.rows import text_size
from gearshift.data.text import replace_surrogates
from gearshift.errors import DataError, OverlongError
from gearshift.runtime.chat_template_arguments import bound_arguments, reads, template_source
from gearshift.runtime.chat_template_renderer import EndlessTemplateError, Rendering, renderer
from gearshift.runtime.terminal import one_line
from gearshift.types import Message

TemplateOptions = Mapping[str, Any]
"""What a row passes to a template besides its messages: `tools`, and further arguments by name."""
PROBE = "Qzprobe"
"""Words that no conversation contains; their position in a text shows what a template did with a
message.
"""
MARK = "Qzmark"
"""Such words for a second message."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which templates read an answer's reasoning; the first one is ours."""
MAX_SIZE = 1 << 22
"""How many characters a conversation may have: about a million tokens of text."""
_RESERVED = {
    "messages", "add_generation_prompt", "chat_template", "conversations",
    "return_assistant_tokens_mask", "continue_final_message",
}  # fmt: skip
"""Arguments of a rendering that neither a row nor a recipe may set."""


def render_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
    asks: bool = False,
) -> str:
    """The template's text of a conversation; with `asks`, followed by the text that asks for an
    answer.

    Raises `DataError` if there is no template, or it refuses the conversation.
    """
    given = _template_form(tokenizer, messages)
    functions = [c["function"] for m in given for c in m.get("tool_calls") or ()]
    written = [str(f["arguments"]) for f in functions if isinstance(f.get("arguments"), dict)]
    written = [value for value in written if value != "{}"]
    try:
        text, _ = _rendered(tokenizer, given, options, asks)
        if not any(value in text for value in written):
            return text
    except DataError:
        if not written:
            raise
    # This template expects the arguments of a call as JSON text, not as an object.
    return _rendered(tokenizer, [_with_json(message) for message in given], options, asks)[0]


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks the assistant's words with `{% generation %}`."""
    return re.search(r"{%-?\s*generation\b", template_source(tokenizer)) is not None


def render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions | None
) -> tuple[list[int], list[int]]:
    """(token ids, mask) by the template's `{% generation %}` marks."""
    text, spans = _rendered(tokenizer, _template_form(tokenizer, messages), options, marks=True)
    encoded = tokenizer(text, add_special_tokens=False)
    ids, mask = list(encoded["input_ids"]), [0] * len(encoded["input_ids"])
    for start, end in spans:
        first, last = encoded.char_to_token(start), encoded.char_to_token(end - 1)
        if first is None:
            break
        for i in range(first, last + 1 if last else len(ids)):
            mask[i] = 1
    return ids, mask


def check_nothing_lost(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions | None
) -> None:
    """Raises `DataError` if the template leaves out a part of the conversation or of its options.

    The reasoning of an answer is checked as if the answer were the last one, because most templates
    drop earlier reasoning.
    """
    options = options or {}
    if unread := [n for n in options if n != "tools" and not reads(tokenizer, n)]:
        raise DataError(f"the chat template does not read `{unread[0]}`; take it out of the row.")
    form = json.dumps([_with_marks(i, message) for i, message in enumerate(messages)], default=str)
    what = json.dumps([bound_arguments(tokenizer, None), options], default=str)
    if unsaid := _first_lost(tokenizer, template_source(tokenizer), form, what):
        raise DataError(left_out_message(unsaid))


def _with_marks(i: int, message: Message) -> Message:
    """The message, with a different mark in place of each text."""
    marked = dict(_with_calls(message))
    for key in ("content", REASONING[0], "name"):
        if message.get(key):
            marked[key] = f"{MARK}{i}{key}."
    if calls := marked.get("tool_calls"):
        marks = [f"{MARK}{i}call{n}" for n in range(len(calls))]
        marked["tool_calls"] = [
            {
                **call,
                "function": {
                    "name": f"{mark}name.",
                    "arguments": {mark: f"{mark}."} if call["function"].get("arguments") else {},
                },
            }
            for mark, call in zip(marks, calls, strict=True)
        ]
    return marked


@lru_cache(4096)
def _first_lost(
    tokenizer: PreTrainedTokenizerBase, source: str, form: str, what: str
) -> str | None:
    """The first part of a conversation of this form (messages of marks) that the template leaves
    out, if there is one. `source` and `what` are there for the cache: they describe the arguments
    of the template.
    """
    messages, (_, options) = json.loads(form), json.loads(what)
    try:
        whole = _all_texts(tokenizer, messages, options)
        without = {**options, "tools": None}
        if options.get("tools") and whole == _all_texts(tokenizer, messages, without):
            return "`tools`"
        for i, message in enumerate(messages):
            of = f"of message {i + 1} ({message['role']})"
            for key in ("content", "name"):
                optional = key == "name" and message["role"] == "tool"  # the call names it
                if not optional and message.get(key, "") not in whole:
                    return f"`{key}` {of}"
            for call in message.get("tool_calls") or ():
                function = call["function"]
                if not all(t in whole for t in (function["name"], *function["arguments"].values())):
                    return f"`tool_calls` {of}"
            thought = message.get(REASONING[0]) if _reasoning_keys(tokenizer) else None
            if thought and thought not in _all_texts(tokenizer, messages[: i + 1], options):
                return f"`{REASONING[0]}` {of}"
    except EndlessTemplateError:
        raise
    except DataError:  # the template refuses marks; its texts will show what it does
        return None
    return None


def _all_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions
) -> str:
    """The text of the conversation, and the text that asks for its last answer: some templates
    write only in the latter what comes before a question.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    before = render_template(tokenizer, asked, options, asks=True) if asked else ""
    return render_template(tokenizer, messages, options) + before


def no_spaces(text: str) -> str:
    """The text without white space, which templates remove and add."""
    return "".join(text.split())


def left_out_message(what: str) -> str:
    """The error message for something that a template leaves out."""
    return (
        f"the chat template leaves out {what}; take it out of the row, or give the tokenizer a "
        "template that writes it."
    )


def prefetch_texts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[tuple[Sequence[Message], bool]],
    options: TemplateOptions | None,
) -> None:
    """Render at once the texts that `render_template` will need, for pairs of (messages, asks)."""
    requests = [
        _request(tokenizer, _template_form(tokenizer, messages), options, asks)
        for messages, asks in conversations
        if messages
    ]
    if requests:
        renderer.ahead(requests[0][0], [request[1:] for request in requests])


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None,
    asks: bool = False,
    marks: bool = False,
) -> Rendering:
    """The template's text and the positions of its marks, as `apply_chat_template` renders them."""
    source, said, arguments = _request(tokenizer, messages, options, asks)
    text, spans = renderer.render(tokenizer.name_or_path, source, said, arguments, marks)
    return replace_surrogates(text), spans


def _request(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None,
    asks: bool,
) -> tuple[str, list[Message], dict[str, Any]]:
    """(the template, the messages, its other arguments)."""
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template; set tokenizer.chat_template and save it, "
            "or use `text` rows."
        )
    options = options or {}
    bound = bound_arguments(tokenizer, options.get("tools"))
    try:
        source = bound.pop("chat_template", None) or tokenizer.get_chat_template(
            None, options.get("tools")
        )
    except ValueError as error:  # there are several templates, and none for this case
        raise DataError(one_line(str(error))) from None
    given = {**bound, **options}
    if taken := given.keys() & _RESERVED:
        raise DataError(
            f"the argument `{min(taken)}` of the chat template is reserved; take it out."
        )
    if (size := text_size([messages, options])) > MAX_SIZE:
        raise OverlongError(f"The conversation has {size:,} characters, over {MAX_SIZE:,}; cut it.")
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]
    return source, said, {**tokenizer.special_tokens_map, **given, "add_generation_prompt": asks}


def with_reasoning(tokenizer: PreTrainedTokenizerBase, message: Message) -> Message:
    """The message with its reasoning under the keys that the template reads; if it reads reasoning
    only as a part of the content, it is put before the content.
    """
    reasoning = message.get(REASONING[0])
    if not reasoning:
        return message
    names = _reasoning_keys(tokenizer)
    rest = {key: value for key, value in message.items() if key != REASONING[0]}
    if names:
        return {**rest, **dict.fromkeys(names, reasoning)}
    if "</think>" in template_source(tokenizer):
        return {
            **rest,
            "content": f"<think>\n{reasoning}\n</think>\n\n{message.get('content') or ''}",
        }
    raise DataError(left_out_message(f"`{REASONING[0]}`"))


def _reasoning_keys(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    source = template_source(tokenizer)
    return [name for name in REASONING if re.search(rf"""[.'"]{name}\b""", source)]


def _template_form(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> list[Message]:
    """The messages with their calls and their reasoning in the form that the template reads."""
    return [with_reasoning(tokenizer, _with_calls(message)) for message in messages]


def _with_calls(message: Message) -> Message:
    """The message with its calls in one common form, and with words: OpenAI's clients send null as
    the content of a message that only calls tools, and templates expect a text.
    """
    if message.get("content") is None:
        message = {**message, "content": ""}
    calls = message.get("tool_calls")
    return {**message, "tool_calls": read_calls(calls, "tool_calls")} if calls else message


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


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pattern for the named special tokens (EOS and so on), and for the added ones, such as Phi's
    `<|end|>`.
    """
    return _specials(tokenizer, len(tokenizer))


@lru_cache(16)
def _specials(tokenizer: PreTrainedTokenizerBase, size: int) -> str:
    """`size` is there for the cache: tokens may be added to the tokenizer."""
    added = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    names = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, names))})" if names else "(?!)"
