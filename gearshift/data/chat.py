"""Chats to tokens by the tokenizer's own template, with exact masks of what the assistant said.

The mask comes from prefixes of the template's rendering: what stands between a conversation that
asks for an answer and the same conversation with the answer is what the assistant must learn to
write, its end token included.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from gearshift.errors import DataError
from gearshift.types import Message


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation that asks for the assistant's next words. Raises `DataError`."""
    return _render(tokenizer, messages, add_generation_prompt=True)


def render_supervised(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """(token ids, mask): the ids are the template's own rendering of the whole conversation; the
    mask is 1 on each assistant message's words and its end token, not on what the template writes
    after it.

    Raises `DataError` if the template cannot tell where an answer begins.
    """
    ids = _render(tokenizer, messages)
    mask = [0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        span = _answer_span(tokenizer, ids, render_prompt(tokenizer, messages[:i]), messages, i)
        if span is None:
            return ids, _template_mask(tokenizer, messages)
        mask[slice(*span)] = [1] * (span[1] - span[0])
    return ids, mask


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """(token ids, mask) of a plain text and the end token; everything is trained but the first
    token, a BOS where the tokenizer puts one: nothing predicts it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = _bos(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*(bos if ids[:1] != bos else []), *ids, *end]
    return ids, [int(i > 0) for i in range(len(ids))]


def render_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: str
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer with its end token). Raises `DataError`."""
    answered = [*prompt, {"role": "assistant", "content": completion}]
    ids, before = _render(tokenizer, answered), render_prompt(tokenizer, prompt)
    span = _answer_span(tokenizer, ids, before, answered, len(prompt))
    if span is None:
        raise DataError(
            "The chat template renders a prompt differently once it is answered; "
            "give the tokenizer a template whose rendering only grows."
        )
    if ids[: len(before)] == before:
        return before, ids[len(before) : span[1]]
    # A token lies across the border; a policy writes the answer after the prompt's own tokens.
    answer = tokenizer.decode(ids[: span[1]])[len(tokenizer.decode(before)) :]
    return before, tokenizer.encode(answer, add_special_tokens=False)


def render_turn(tokenizer: PreTrainedTokenizerBase, said: Sequence[Message]) -> list[int]:
    """What follows an answer's end token when these messages come next and the assistant is asked
    again.

    So that an episode goes on from the sampled tokens themselves: they are never encoded a second
    time.
    """
    opening = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *said]
    ids = render_prompt(tokenizer, opening)
    span = _answer_span(tokenizer, ids, render_prompt(tokenizer, opening[:1]), opening, 1)
    if span is None:
        raise DataError(
            "The chat template rewrites earlier turns when a new one comes; "
            "give the tokenizer a template whose rendering only grows."
        )
    return ids[span[1] :]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn: EOS, and the one that the template puts there."""
    found = {t for t in [tokenizer.eos_token_id] if t is not None}
    if tokenizer.chat_template:
        _, answer = render_completion(tokenizer, [{"role": "user", "content": "a"}], "b")
        found |= {answer[-1]} & _special_ids(tokenizer)
    return frozenset(found)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError(
            "The tokenizer has no chat template; set tokenizer.chat_template and save it, "
            "or use `text` rows."
        )
    try:
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, return_dict=False
        )
    except Exception as error:  # a template's own raise_exception, or one that wants other fields
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(f"The chat template refuses this conversation: {reason}.") from error
    ids = cast(list[int], ids)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            "The chat template writes the BOS token twice; "
            "take one of the two out of the template or the tokenizer."
        )
    return ids


def _answer_span(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    before: list[int],
    messages: Sequence[Message],
    i: int,
) -> tuple[int, int] | None:
    """Where message i, an answer, stands in `ids`, the rendering of all messages: every token with
    some of its words, and its end token. None if the template renders what is before it in another
    way than `before`, the prompt that it answers, so that it cannot be told.
    """
    start = len(before)
    if ids[:start] != before:
        # A token may lie across the border: the header's newline and the answer's make one.
        if not tokenizer.decode(ids).startswith(tokenizer.decode(before)):
            return None
        pairs = enumerate(zip(ids, before, strict=False))
        start = next((j for j, (one, other) in pairs if one != other), 0)
    special = _special_ids(tokenizer)
    answered = ids if i + 1 == len(messages) else _render(tokenizer, messages[: i + 1])
    if ids[: len(answered)] != answered:
        # What follows makes the template write this answer differently: without its reasoning, or
        # without an EOS that only the last one has. Its end token is still the first to come.
        return next(((start, j + 1) for j in range(start, len(ids)) if ids[j] in special), None)
    # The end token is the first of the special tokens and white space that stand at the end.
    end = len(answered)
    for j in reversed(range(start, len(answered))):
        if answered[j] in special:
            end = j + 1
        elif tokenizer.decode([answered[j]]).strip():
            break
    return start, end


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Those with a name (EOS and so on), and those that are only added: Phi's `<|end|>`."""
    added = {token for token, t in tokenizer.added_tokens_decoder.items() if t.special}
    return added | set(tokenizer.all_special_ids)


def _template_mask(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The mask from the template's own `{% generation %}` marks, where it has them."""
    if re.search(r"{%-?\s*generation\b", tokenizer.get_chat_template()):
        out = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["assistant_masks"])
    raise DataError(
        "The chat template renders earlier turns differently once they are answered, so the "
        "assistant's tokens cannot be told; add {% generation %} marks to the template."
    )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before a text, if it does."""
    ids = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
