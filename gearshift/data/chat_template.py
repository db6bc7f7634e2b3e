"""A tokenizer's chat template: the text that it makes of a conversation, and what it is given
beside the messages.
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
"""What a row gives a template beside its messages: `tools`, and further arguments by name."""
PROBE = "Qzprobe"
"""Words that no conversation has: where they come out shows what a template does with a text."""
MARK = "Qzmark"
"""The same, for another text beside it."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys under which templates read an answer's reasoning; rows are read into the first."""
MAX_SIZE = 1 << 22
"""Characters of a conversation: as much as a million tokens of text."""
_RESERVED = {
    "messages", "add_generation_prompt", "chat_template", "conversations",
    "return_assistant_tokens_mask", "continue_final_message",
}  # fmt: skip
"""Arguments of a rendering that are no row's and no recipe's."""


def render_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
    asks: bool = False,
) -> str:
    """The template's text of a conversation; `asks`: with what asks for the assistant's words.

    Raises `DataError` if there is no template, or it refuses.
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
    # This template takes a call's arguments as JSON in a text, not as what JSON means.
    return _rendered(tokenizer, [_with_json(message) for message in given], options, asks)[0]


def has_generation_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template marks what the assistant says, as `{% generation %}`."""
    return re.search(r"{%-?\s*generation\b", template_source(tokenizer)) is not None


def render_marked(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions | None
) -> tuple[list[int], list[int]]:
    """(token ids, mask) by these marks."""
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
    """Raises `DataError` if the template leaves out what the conversation or its options say.

    The reasoning of an answer is looked for where it is the last one: most templates drop it later.
    """
    options = options or {}
    if unread := [n for n in options if n != "tools" and not reads(tokenizer, n)]:
        raise DataError(f"the chat template does not read `{unread[0]}`; take it out of the row.")
    form = json.dumps([_with_marks(i, message) for i, message in enumerate(messages)], default=str)
    what = json.dumps([bound_arguments(tokenizer, None), options], default=str)
    if unsaid := _first_lost(tokenizer, template_source(tokenizer), form, what):
        raise DataError(left_out_message(unsaid))


def _with_marks(i: int, message: Message) -> Message:
    """The message with a mark of its own in the place of each text."""
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
    """What does not come out of a conversation of this form (messages of marks), if anything.
    `source` and `what` tell apart what the tokenizer is given.
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
    except DataError:  # it refuses marks; what it makes of the texts themselves will be seen
        return None
    return None


def _all_texts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions
) -> str:
    """The conversation, and what asks for its last answer: some templates write only there what
    comes before a question.
    """
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    before = render_template(tokenizer, asked, options, asks=True) if asked else ""
    return render_template(tokenizer, messages, options) + before


def no_spaces(text: str) -> str:
    """Without white space, which templates trim and add."""
    return "".join(text.split())


def left_out_message(what: str) -> str:
    """The error's words for something that does not come out."""
    return (
        f"the chat template leaves out {what}; take it out of the row, or give the tokenizer a "
        "template that writes it."
    )


def prefetch_texts(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[tuple[Sequence[Message], bool]],
    options: TemplateOptions | None,
) -> None:
    """Have the texts of what `text_of` will be asked for, (messages, asks) each, made at once."""
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
    """The template's text, and where its marks stand, as `apply_chat_template` renders it."""
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
    except ValueError as error:  # several templates, and none for this
        raise DataError(one_line(str(error))) from None
    given = {**bound, **options}
    if taken := given.keys() & _RESERVED:
        raise DataError(f"the template has its own `{min(taken)}`; take it out of the arguments.")
    if (size := text_size([messages, options])) > MAX_SIZE:
        raise OverlongError(f"The conversation has {size:,} characters, over {MAX_SIZE:,}; cut it.")
    said = [{k: v for k, v in message.items() if v is not None} for message in messages]
    return source, said, {**tokenizer.special_tokens_map, **given, "add_generation_prompt": asks}


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
    """The message with its calls in the one form, whoever wrote them."""
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
