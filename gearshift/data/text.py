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
_MARGIN = 16
"""How many characters a decoder may change on each side of a place where the tokens are cut: the
rest of a character, a space, a pattern of the clean-up."""


def replace_surrogates(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair, which no tokenizer
    accepts.
    """
    return _HALF_PAIR.sub("\ufffd", text)


def decode(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    skip_special_tokens: bool = False,
    clean_up: bool | None = None,
) -> str:
    """The text of these tokens. An unknown token has no text: an embedding may have more rows than
    there are tokens, and such a row can be sampled. `clean_up`: whether spaces before punctuation
    marks are removed; None does what the tokenizer does.
    """
    options = {"skip_special_tokens": skip_special_tokens}
    if clean_up is not None:
        options["clean_up_tokenization_spaces"] = clean_up
    try:
        return str(tokenizer.decode(ids, **options))
    except (ValueError, LookupError, TypeError, OverflowError):
        known = set(tokenizer.get_vocab().values())
        return str(tokenizer.decode([token for token in ids if token in known], **options))


def has_stop(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str], first: int = 0
) -> bool:
    """Whether the text of these tokens contains one of the strings, after the text of the `first`
    tokens.

    The caller asks after each token and ends at the first yes, so a string that is found now ends
    in the last token. Only the end of the text is decoded to look for it, and the whole text to
    confirm it.
    """
    text = _end_of_text(tokenizer, ids, max(map(len, stops)))
    if not any(stop in text for stop in stops):
        return False
    text = decode(tokenizer, ids)[len(decode(tokenizer, ids[:first])) :]
    return any(stop in text for stop in stops)


def _end_of_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], size: int) -> str:
    """The end of the tokens' text, with at least `size` characters before the last token's; the
    whole text where its end cannot be decoded alone.
    """
    before = size + _MARGIN
    last = len(decode(tokenizer, ids[-1:]))
    start = len(ids) - 1 - before
    while start > 0:
        if _is_open(tokenizer, ids[start]):  # bytes in a row are decoded together
            start -= 1
            continue
        text = decode(tokenizer, ids[start:])
        if tokenizer.clean_up_tokenization_spaces and text != decode(
            tokenizer, ids[start:], clean_up=False
        ):
            break  # where patterns overlap, the first one decides, however far it is
        if len(text) >= before + last:
            return text
        start -= before
    return decode(tokenizer, ids)


def stream_text(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens, without special ones, in pieces that together equal the text that
    `decode` gives. Text that a later token may change is held back: half a character, or a space
    before a punctuation mark.
    """
    ids: list[int] = []
    sent = 0
    for token in tokens:
        ids.append(token)
        text = settled_text(tokenizer, ids)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    rest = decode(tokenizer, ids, skip_special_tokens=True)[sent:]
    if rest:
        yield rest


def settled_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The part of the text that no later token can change."""
    end = len(ids)
    while end and _is_open(tokenizer, ids[end - 1]):
        end -= 1
    text = decode(tokenizer, ids[:end], skip_special_tokens=True).rstrip("\ufffd")
    if not tokenizer.clean_up_tokenization_spaces:
        return text
    raw = decode(tokenizer, ids[:end], skip_special_tokens=True, clean_up=False).rstrip("\ufffd")
    settled = str(raw.rstrip(_OPEN))
    return settled if raw == text else tokenizer.clean_up_tokenization(settled)


def _is_open(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether the token has no text, or is one byte of a character that may go on."""
    if not decode(tokenizer, [token], skip_special_tokens=True):
        return True
    return _BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token))) is not None
