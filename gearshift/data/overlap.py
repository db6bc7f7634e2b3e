"""Compares the prompts of two sets of rows, to find equal and nearly equal ones.

It serves splits that must share no prompt. It knows messages and texts; it must not know files or
splits.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gearshift.data.formats import to_preference, to_prompt, to_supervised
from gearshift.data.rows import Row
from gearshift.errors import DataError
from gearshift.types import Message

Codes = NDArray[np.uint64]

NEAR_SHARE = 0.7
"""Two prompts count as nearly equal if they share at least this part of their pieces."""
_PIECE, _KEYS, _MOST = 5, 8, 10
_MARKS = 100
"""No language has this many marks on one letter."""
_LONGEST = 2000
"""How many characters of a prompt the search for nearly equal prompts reads."""


def prompt_text(messages: Sequence[Message]) -> str:
    """The prompt as a text that is the same for equal questions: the roles and the words, without
    differences of case, white space and Unicode form.
    """
    return "\n".join(f"{m['role']}: {_message_text(m)}" for m in messages)


def prompt_keys(prompts: Sequence[Sequence[Message]]) -> list[str]:
    """The `prompt_text` of each prompt without its system messages, which usually only set the
    scene; with them if they are the only difference.
    """
    bare = [prompt_text([m for m in p if m["role"] != "system"]) for p in prompts]
    return bare if len(set(bare)) > 1 else [prompt_text(p) for p in prompts]


def row_prompts(row: Row) -> list[list[Message]]:
    """The prompts in a row of any format: what comes before each turn of the assistant. Empty for a
    plain text, and for a row that no stage would accept.
    """
    try:
        if "chosen" in row:
            return [to_preference(row).prompt]
        if "prompt" in row or "completion" in row or "instruction" in row:
            return [to_prompt(row).prompt]
        example = to_supervised(row)
    except DataError:
        return []
    messages = getattr(example, "messages", [])
    return [messages[:i] for i, m in enumerate(messages) if m["role"] == "assistant"]


def near_duplicates(texts: Sequence[str], others: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs (i, j): text i is nearly equal to the other text j; only the first such j counts. Equal
    texts are left out.

    Two texts are nearly equal if their pieces of five characters overlap by 0.7 (Jaccard's measure)
    and they have the same numbers, because sums with other numbers are other questions. A bottom
    sketch (Broder 1997) finds the candidates: at most 10 for each of the 8 smallest hashes of a
    text's pieces. So the cost grows with the number of texts, and a few pairs among thousands of
    one pattern may be missed.
    """
    pieces = [_pieces(text) for text in others]
    holders: dict[int, list[int]] = {}
    for j, found in enumerate(pieces):
        for key in found[:_KEYS].tolist():
            holders.setdefault(key, []).append(j)
    numbers = [_numbers(text) for text in others]
    for i, text in enumerate(texts):
        mine, own = _pieces(text), _numbers(text)
        found_j = {j for k in mine[:_KEYS].tolist() for j in holders.get(k, [])[:_MOST]}
        for j in sorted(found_j):
            if own == numbers[j] and text != others[j] and _share(mine, pieces[j]) >= NEAR_SHARE:
                yield i, j
                break


def _message_text(message: Message) -> str:
    calls = message.get("tool_calls")
    return _normalized(message.get("content") or "") + (json.dumps(calls) if calls else "")


def _normalized(text: str) -> str:
    # Unicode normalization of many marks on one letter takes a time that grows with the square of
    # their number.
    marks = b"" if text.isascii() else bytes(unicodedata.combining(c) > 0 for c in text)
    if bytes([True]) * _MARKS in marks:
        return " ".join(text.casefold().split())
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _pieces(text: str) -> Codes:
    """Hashes of the text's pieces of `_PIECE` bytes, without punctuation, in order."""
    words = " ".join(re.findall(r"\w+", text[:_LONGEST])).encode().ljust(_PIECE)
    data = np.frombuffer(words, dtype=np.uint8).astype(np.uint64)
    count = len(data) - _PIECE + 1
    codes = np.zeros(count, dtype=np.uint64)
    for i in range(_PIECE):
        codes = codes << np.uint64(8) | data[i : i + count]
    # so that the smallest hashes are a random choice
    return np.unique(codes * np.uint64(0x9E3779B97F4A7C15))


def _share(one: Codes, other: Codes) -> float:
    """Jaccard's measure of two sets of pieces."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))
