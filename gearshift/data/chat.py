"""Chats to tokens by the tokenizer's own template, with exact masks of what the assistant said.

The mask comes from prefixes of the template's rendering: what stands between a conversation that
asks for an answer and the same conversation with the answer is what the assistant must learn to
write, its end token included.
"""

from __future__ import annotations

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
        before = _render(tokenizer, messages[:i], add_generation_prompt=True)
        after = _render(tokenizer, messages[: i + 1])
        if ids[: len(before)] != before or ids[: len(after)] != after:
            return ids, _template_mask(tokenizer, messages, ids)
        end = _end_of_turn(tokenizer, after, len(before))
        mask[len(before) : end] = [1] * (end - len(before))
    return ids, mask


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """(token ids, mask) of a plain text and the end token; everything is trained but a BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = _bos(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*bos, *ids, *end], [0] * len(bos) + [1] * (len(ids) + len(end))


def render_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], completion: str
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer with its end token)."""
    before = render_prompt(tokenizer, prompt)
    whole = _render(tokenizer, [*prompt, {"role": "assistant", "content": completion}])
    if whole[: len(before)] != before:
        raise DataError(
            "The chat template renders a prompt differently once it is answered; "
            "give the tokenizer a template "
            "whose rendering only grows."
        )
    return before, whole[len(before) : _end_of_turn(tokenizer, whole, len(before))]


def render_turn(tokenizer: PreTrainedTokenizerBase, message: Message) -> list[int]:
    """What follows an answer's end token when `message` comes next and the assistant is asked
    again.

    So that an episode goes on from the sampled tokens themselves: they are never encoded a second
    time.
    """
    opening = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    before = render_prompt(tokenizer, opening[:1])
    answered = _render(tokenizer, opening)
    end = _end_of_turn(tokenizer, answered, len(before))
    whole = render_prompt(tokenizer, [*opening, message])
    if whole[:end] != answered[:end]:
        raise DataError(
            "The chat template rewrites earlier turns when a new one comes; "
            "give the tokenizer a template whose "
            "rendering only grows."
        )
    return whole[end:]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn: EOS, and the one that the template puts there."""
    prompt = [{"role": "user", "content": "a"}]
    _, answer = render_completion(tokenizer, prompt, "b")
    found = {answer[-1]} & set(tokenizer.all_special_ids)
    return frozenset(found | {t for t in [tokenizer.eos_token_id] if t is not None})


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
        raise DataError(f"The chat template refuses this conversation: {error}.") from error
    ids = cast(list[int], ids)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            "The chat template writes the BOS token twice; "
            "take one of the two out of the template or the tokenizer."
        )
    return ids


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int) -> int:
    """Where an answer that ends the rendering `ids` ends itself: after its last special token, if
    it has one.
    """
    special = set(tokenizer.all_special_ids)
    for i in reversed(range(start, len(ids))):
        if ids[i] in special:
            return i + 1
    return len(ids)


def _template_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ids: list[int]
) -> list[int]:
    """The mask from the template's own `{% generation %}` marks, where it has them."""
    if "{% generation" in str(tokenizer.chat_template) or "{%- generation" in str(
        tokenizer.chat_template
    ):
        out = tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["assistant_masks"])
    raise DataError(
        "The chat template renders earlier turns differently once they are answered, "
        "so the assistant's tokens "
        "cannot be told; add {% generation %} marks to the template."
    )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before a text, if it does."""
    ids = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
