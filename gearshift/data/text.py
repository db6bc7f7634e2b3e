"""Turns tokens into text, as a whole or in pieces while they are sampled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

_HALF_PAIR = re.compile("[\ud800-\udfff]")
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The tokenizer's clean-up removes the space in " .", " ' ", " n't" and similar patterns. Only these
# characters can begin such a pattern.
_OPEN = " 'nvr"


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair, which no tokenizer
    accepts.
    """
    return _HALF_PAIR.sub("\ufffd", text)


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool = False
) -> str:
    """The text of these tokens. An unknown token has no text: an embedding may have more rows than
    there are tokens, and such a row can be sampled.
    """
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    except (ValueError, LookupError, TypeError, OverflowError):
        known = set(tokenizer.get_vocab().values())
        kept = [token for token in ids if token in known]
        return str(tokenizer.decode(kept, skip_special_tokens=skip_special_tokens))


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens, without special ones, in pieces that together equal the text that
    `decode` gives. Text that a later token may change is held back: half a character, or a space
    before a punctuation mark.
    """
    ids: list[int] = []
    sent = 0
    for token in tokens:
        ids.append(token)
        text = _settled(tokenizer, ids)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    rest = decode(tokenizer, ids, skip_special_tokens=True)[sent:]
    if rest:
        yield rest


def _settled(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The part of the text that no later token can change."""
    end = len(ids)
    while end and _is_open(tokenizer, ids[end - 1]):
        end -= 1
    text = decode(tokenizer, ids[:end], skip_special_tokens=True).rstrip("\ufffd")
    if not tokenizer.clean_up_tokenization_spaces:
        return text
    raw = tokenizer.decode(
        ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).rstrip("\ufffd")
    settled = str(raw.rstrip(_OPEN))
    return settled if raw == text else tokenizer.clean_up_tokenization(settled)


def _is_open(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether the token has no text, or is one byte of a character that may go on."""
    if not decode(tokenizer, [token], skip_special_tokens=True):
        return True
    return _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))) is not None
