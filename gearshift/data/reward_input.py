"""The tokens that a reward model reads. A text must not be able to deceive it: the name of a
special token in a text stays letters, and an answer that was cut has no end token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import completion_texts, render_completion, render_prompt
from gearshift.data.chat_template import TemplateOptions, render_template, special_token_pattern
from gearshift.data.text import replace_surrogates
from gearshift.types import Message

_PLACEHOLDER = "\ue000{}\ue001"
"""Replaces a message's words while the template is rendered; the characters are for private use."""


def render_reward_input(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: str | Message,
    ended: bool = True,
    options: TemplateOptions | None = None,
) -> list[int]:
    """The tokens of prompt and answer, with the answer's end token if it `ended` by itself. Raises
    `DataError`.
    """
    message = completion
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    answered = [*prompt, message]
    if _any_special_token(tokenizer, answered):
        before, answer = completion_texts(tokenizer, _with_placeholders(answered), options)
        if not ended:
            answer = re.sub(rf"{special_token_pattern(tokenizer)}\Z", "", answer)
        return _fill_placeholders(tokenizer, before + answer, answered)
    prompt_ids, answer_ids = render_completion(tokenizer, prompt, completion, options)
    if not ended and names_special_token(tokenizer, tokenizer.decode(answer_ids[-1:])):
        answer_ids.pop()
    return [*prompt_ids, *answer_ids]


def render_literal_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
) -> list[int]:
    """Like `render_prompt`, but the names of special tokens in the messages stay letters. Raises
    `DataError`.
    """
    if not _any_special_token(tokenizer, messages):
        return render_prompt(tokenizer, messages, options)
    text = render_template(tokenizer, _with_placeholders(messages), options, asks=True)
    return _fill_placeholders(tokenizer, text, messages)


def names_special_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text contains the name of a special token."""
    return re.search(special_token_pattern(tokenizer), text) is not None


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a text, without special tokens, even if it contains their names."""
    text = replace_surrogates(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def _any_special_token(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    return any(names_special_token(tokenizer, m["content"]) for m in messages)


def _with_placeholders(messages: Sequence[Message]) -> list[Message]:
    return [
        {**m, "content": _PLACEHOLDER.format(i)} if m["content"] else m
        for i, m in enumerate(messages)
    ]


def _fill_placeholders(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message]
) -> list[int]:
    """The tokens of the rendered messages, with each message's words in place of its placeholder;
    each piece is encoded alone.
    """
    pieces = re.split(_PLACEHOLDER.format(r"(\d+)"), text)
    ids: list[int] = tokenizer.encode(pieces[0], add_special_tokens=False)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        ids += encode_plain(tokenizer, messages[int(i)]["content"])
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids
