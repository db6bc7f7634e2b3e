"""Chats as tokens, by the tokenizer's own chat template, with exact masks of the assistant's
answers.

An answer is found by comparing the template's texts: the difference between a conversation that
asks for an answer and the same conversation with the answer is what the assistant must learn to
write, its end token included.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.answer_spans import (
    AmbiguousAnswerError,
    Span,
    answer_span,
    closing_token,
    prefetch_answers,
    prompt_and_answer,
)
from gearshift.data.chat_template import (
    PROBE,
    REASONING,
    TemplateOptions,
    check_nothing_lost,
    has_generation_marks,
    render_marked,
    render_template,
    special_token_pattern,
)
from gearshift.data.text import decode, replace_surrogates
from gearshift.errors import DataError
from gearshift.runtime.chat_template_renderer import EndlessTemplateError
from gearshift.types import Message

Rendered = tuple[list[int], list[int]]
"""(token ids, mask)."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
) -> list[int]:
    """The token ids of a conversation that asks for the assistant's next message. Raises
    `DataError`, also if the template leaves out a part of the conversation.
    """
    check_nothing_lost(tokenizer, messages, options)
    return _encode(tokenizer, render_template(tokenizer, messages, options, asks=True))


def render_prefill(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
) -> list[int]:
    """The token ids of a conversation whose last message is the beginning of the assistant's
    answer, so that a model continues it. Raises `DataError`, as `render_prompt`.
    """
    asked, begun = messages[:-1], messages[-1]["content"] or ""
    check_nothing_lost(tokenizer, asked, options)
    before = render_template(tokenizer, asked, options, asks=True)
    prompt, answer = _continued(tokenizer, before, replace_surrogates(begun))
    return [*prompt, *answer]


def render_supervised(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
) -> Rendered:
    """(token ids, mask) of a whole conversation. The ids are the template's own rendering. The mask
    is 1 on each assistant message and its end token, and 0 on what the template writes after it. If
    the template opens an answer only when it asks for one (with `<think>`), the answer follows the
    prompt in that form.

    Raises `DataError` if the texts do not show where an answer begins, or if a policy would have
    written an earlier answer in another form; `render_conversation` gives such an answer a sequence
    of its own.
    """
    rendered = render_conversation(tokenizer, messages, options)
    if len(rendered) > 1:
        raise DataError(
            "the chat template writes an earlier answer in another form than a policy does, so "
            "each answer needs a sequence of its own; to train them in one, add {% generation %} "
            "marks to it."
        )
    return rendered[0]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None = None,
    untrained: Collection[int] = (),
) -> list[Rendered]:
    """The fewest sequences that train each answer as a policy writes it, without the answers in
    `untrained`: the whole conversation, and one more for each answer that the whole conversation
    shows in another form.

    Templates drop the reasoning of an earlier answer, or open an answer that they ask for with
    `<think>`. Raises `DataError` if the texts do not show an answer, or the template leaves out
    some of the words.
    """
    check_nothing_lost(tokenizer, messages, options)
    answers = [
        (i, message)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and i not in untrained
    ]
    prefetch_answers(tokenizer, [messages[: i + 1] for i, _ in answers], options)
    whole = render_template(tokenizer, messages, options)
    spans: list[Span] = []
    alone: list[Rendered] = []
    for i, message in answers:
        try:
            before, answer = prompt_and_answer(tokenizer, messages[: i + 1], options)
        except AmbiguousAnswerError:
            if not has_generation_marks(tokenizer):
                raise
            return [_marked(tokenizer, messages, options, untrained)]
        _check_end(tokenizer, answer, message)
        span = answer_span(tokenizer, messages, i, options, whole, before, answer)
        if span is None:
            prompt, written = _continued(tokenizer, before, answer)
            alone.append(([*prompt, *written], [0] * len(prompt) + [1] * len(written)))
        else:
            spans.append(span)
    return [*([_masked(tokenizer, whole, spans)] if spans or not alone else []), *alone]


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Rendered:
    """(token ids, mask) of a plain text and the end token. Everything is trained except the first
    token, because no token predicts it; where the tokenizer puts a BOS, it is that.
    """
    ids = tokenizer.encode(replace_surrogates(text), add_special_tokens=False)
    bos = _bos(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*(bos if ids[:1] != bos else []), *ids, *end]
    return ids, [int(i > 0) for i in range(len(ids))]


def render_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: str | Message,
    options: TemplateOptions | None = None,
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer with its end token). The answer is a text, or a message
    with tool calls or reasoning. Raises `DataError`.
    """
    message = completion
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    return _continued(tokenizer, *completion_texts(tokenizer, [*prompt, message], options))


def completion_texts(
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[Message],
    options: TemplateOptions | None = None,
) -> tuple[str, str]:
    """The template's texts of the prompt and of its answer, which is the last message, with its end
    token. Raises `DataError`.
    """
    check_nothing_lost(tokenizer, answered, options)
    prefetch_answers(tokenizer, [answered], options)
    return prompt_and_answer(tokenizer, answered, options)


def render_turn(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[Message],
    options: TemplateOptions | None = None,
) -> list[int]:
    """The tokens between an answer's end token and the next answer, when these messages come in
    between.

    With them an episode continues from the sampled tokens themselves, which are never encoded a
    second time.
    """
    opening = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        whole = render_template(tokenizer, [*opening, *said], options, asks=True)
    except DataError:
        if said[0]["role"] != "tool":
            raise
        # this template needs the call that the tool answers
        opening[1] = _calling(said[0].get("name") or "tool")
        whole = render_template(tokenizer, [*opening, *said], options, asks=True)
    check_nothing_lost(tokenizer, [*opening, *said], options)
    before, answer = prompt_and_answer(tokenizer, opening, options)
    if whole.startswith(before + answer):
        end = len(before + answer)
    else:
        at = whole.find(PROBE)
        if at < 0:
            raise DataError(
                "The chat template leaves out earlier answers when a new message comes; "
                "give the tokenizer a template that keeps them."
            )
        tail = whole[at + len(PROBE) :]
        end = at + len(PROBE) + len(closing_token(tokenizer, tail, answer))
    return _continued(tokenizer, whole[:end], whole[end:])[1]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn: EOS, and the tokens that the template writes after
    words and after a tool call. Only EOS if the texts do not show them.
    """
    found = {t for t in [tokenizer.eos_token_id] if t is not None}
    for answer in ({"role": "assistant", "content": PROBE}, _calling("tool")):
        try:
            _, text = prompt_and_answer(tokenizer, [{"role": "user", "content": "a"}, answer], None)
        except EndlessTemplateError:
            break
        except DataError:
            continue
        if end := re.search(f"{special_token_pattern(tokenizer)}$", text):
            found.add(tokenizer.convert_tokens_to_ids(end.group()))
    return frozenset(found)


def _calling(name: str) -> Message:
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _check_end(tokenizer: PreTrainedTokenizerBase, answer: str, message: Message) -> None:
    """Raises `DataError` if a policy would not learn to end where this answer ends."""
    end = re.search(f"{special_token_pattern(tokenizer)}$", answer)
    if not end:
        raise DataError(
            "the chat template writes no end token after an answer, so that a policy would never "
            "learn to end; give the tokenizer a template that does."
        )
    if any(end.group() in str(message.get(key)) for key in ("content", REASONING[0])):
        raise DataError(
            f"an answer has its end token {end.group()} inside; take it out of the row."
        )


def _marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: TemplateOptions | None,
    untrained: Collection[int],
) -> Rendered:
    """(token ids, mask) by the template's own marks, which enclose each answer."""
    ids, mask = render_marked(tokenizer, messages, options)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [j for j, m in enumerate(mask) if m and (j == 0 or not mask[j - 1])]
    if len(starts) != len(answers) and untrained:
        raise DataError("the template's marks do not tell which answer is which.")
    for start, i in zip(starts, answers, strict=False):
        for j in range(start, len(mask)) if i in untrained else ():
            if not mask[j]:
                break
            mask[j] = 0
    return ids, mask


def _continued(
    tokenizer: PreTrainedTokenizerBase, before: str, after: str
) -> tuple[list[int], list[int]]:
    """The token ids of two texts that follow each other. Where a token would cross the border, the
    second text is encoded alone: a policy writes after the prompt's own tokens.
    """
    first, both = _encode(tokenizer, before), _encode(tokenizer, before + after)
    if both[: len(first)] == first:
        return first, both[len(first) :]
    return first, tokenizer.encode(after, add_special_tokens=False)


def _masked(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Rendered:
    """(ids, mask) of a text; the mask is 1 on each token with a character in one of the spans."""
    if not tokenizer.is_fast:  # such a tokenizer gives no offsets
        ids = _encode(tokenizer, text)
        ends = [len(decode(tokenizer, ids[: i + 1])) for i in range(len(ids))]
        parts = zip([0, *ends], ends, strict=False)
        return ids, [int(any(a < end and start < b for start, end in spans)) for a, b in parts]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = _once_bos(tokenizer, encoded["input_ids"]), []
    firsts, lasts = _apart(spans)
    before = 0
    for start, end in encoded["offset_mapping"]:
        # Some tokenizers leave white space out of a token's offsets.
        start, before = min(start, before), end
        span = bisect_right(lasts, start)  # the first span that does not end before the token
        mask.append(int(span < len(firsts) and firsts[span] < end))
    return ids, mask


def _apart(spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The starts and the ends of the spans, in order; spans that overlap are joined."""
    firsts: list[int] = []
    lasts: list[int] = []
    for first, last in sorted(spans):
        if lasts and first < lasts[-1]:
            lasts[-1] = max(last, lasts[-1])
        else:
            firsts.append(first)
            lasts.append(last)
    return firsts, lasts


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _once_bos(tokenizer, tokenizer.encode(text, add_special_tokens=False))


def _once_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids of a template's text. Raises `DataError` if it begins with BOS twice."""
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            "The chat template writes the BOS token twice; "
            "take one of the two out of the template or the tokenizer."
        )
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token, if the tokenizer puts it before a text."""
    ids: list[int] = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
