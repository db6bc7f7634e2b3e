"""What a reward model reads of a conversation. A judge of texts must not be fooled by them: special
tokens that somebody spelled in letters stay letters, and an answer that was cut has no end token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import completion_texts, render_completion, render_prompt
from gearshift.data.template import Options, special_tokens, text_of
from gearshift.data.text import whole_characters
from gearshift.types import Message

_MARK = "\ue000{}\ue001"
"""Stands for a message's words while the template is rendered; private-use characters."""


def render_scored(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: str | Message,
    ended: bool = True,
    options: Options | None = None,
) -> list[int]:
    """Prompt and answer, its end token included where it `ended` by itself. Raises `DataError`."""
    message = completion
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    answered = [*prompt, message]
    if _spelled(tokenizer, answered):
        before, answer = completion_texts(tokenizer, _marked(answered), options)
        if not ended:
            answer = re.sub(rf"{special_tokens(tokenizer)}\Z", "", answer)
        return _unmarked(tokenizer, before + answer, answered)
    prompt_ids, answer_ids = render_completion(tokenizer, prompt, completion, options)
    if not ended and spells(tokenizer, tokenizer.decode(answer_ids[-1:])):
        answer_ids.pop()
    return [*prompt_ids, *answer_ids]


def render_asked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
) -> list[int]:
    """`render_prompt`, where what is spelled stays letters. Raises `DataError`."""
    if not _spelled(tokenizer, messages):
        return render_prompt(tokenizer, messages, options)
    text = text_of(tokenizer, _marked(messages), options, asks=True)
    return _unmarked(tokenizer, text, messages)


def spells(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the text has a special token's name in it."""
    return re.search(special_tokens(tokenizer), text) is not None


def letters(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that has no special tokens, whatever it spells."""
    text = whole_characters(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def _spelled(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    return any(spells(tokenizer, m["content"]) for m in messages)


def _marked(messages: Sequence[Message]) -> list[Message]:
    return [
        {**m, "content": _MARK.format(i)} if m["content"] else m for i, m in enumerate(messages)
    ]


def _unmarked(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: Sequence[Message]
) -> list[int]:
    """The rendering of marked messages with their words in the marks' places, piece by piece."""
    pieces = re.split(_MARK.format(r"(\d+)"), text)
    ids: list[int] = tokenizer.encode(pieces[0], add_special_tokens=False)
    for i, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        ids += letters(tokenizer, messages[int(i)]["content"])
        ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids
