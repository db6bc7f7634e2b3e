"""Chats to tokens by the tokenizer's own template, with exact masks of what the assistant said.

What an answer is is told by comparing the template's texts: what stands between a conversation that
asks for an answer and the same conversation with the answer is what the assistant must learn to
write, its end token included.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.template import (
    MARK,
    PROBE,
    REASONING,
    Options,
    check_said,
    has_marks,
    left_out,
    marked,
    special_tokens,
    squeezed,
    text_of,
    with_reasoning,
)
from gearshift.data.text import decode
from gearshift.errors import DataError
from gearshift.types import Message

Rendered = tuple[list[int], list[int]]
"""(token ids, mask)."""
Span = tuple[int, int]


class _UntoldAnswerError(DataError):
    """The template does not let an answer be told from what stands before it."""


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
) -> list[int]:
    """Token ids of a conversation that asks for the assistant's next words. Raises `DataError`,
    also if the template leaves out some of it.
    """
    check_said(tokenizer, messages, options)
    return _encode(tokenizer, text_of(tokenizer, messages, options, asks=True))


def render_supervised(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
) -> Rendered:
    """(token ids, mask): the ids are the template's own rendering of the whole conversation; the
    mask is 1 on each assistant message's words and its end token, not on what the template writes
    after it. An answer that the template opens only when it asks for it (with `<think>`) follows
    the prompt as it is when it asks.

    Raises `DataError` if the template cannot tell where an answer begins, or a policy would have
    written an earlier one in another way; `render_conversation` gives that one its own sequence.
    """
    rendered = render_conversation(tokenizer, messages, options)
    if len(rendered) > 1:
        raise DataError(
            "the chat template writes an earlier answer otherwise than a policy does, so that each "
            "needs a sequence of its own; to train them in one, add {% generation %} marks to it."
        )
    return rendered[0]


def render_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
    untrained: Collection[int] = (),
) -> list[Rendered]:
    """As few sequences as train each answer as a policy writes it, but those `untrained`: the
    whole conversation, and one up to each answer that the whole has in a form that is not so.

    Templates drop an earlier answer's reasoning, or open one that is asked for with `<think>`.
    Raises `DataError` if an answer cannot be told, or the template leaves out some of the words.
    """
    check_said(tokenizer, messages, options)
    whole = text_of(tokenizer, messages, options)
    spans: list[Span] = []
    alone: list[Rendered] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i in untrained:
            continue
        try:
            before, answer = _answer(tokenizer, messages[: i + 1], options)
        except _UntoldAnswerError:
            if not has_marks(tokenizer):
                raise
            return [_marked(tokenizer, messages, options, untrained)]
        _check_end(tokenizer, answer, message)
        span = _span(tokenizer, messages, i, options, whole, before, answer)
        if span is None:
            prompt, written = _continued(tokenizer, before, answer)
            alone.append(([*prompt, *written], [0] * len(prompt) + [1] * len(written)))
        else:
            spans.append(span)
    return [*([_masked(tokenizer, whole, spans)] if spans or not alone else []), *alone]


def render_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Rendered:
    """(token ids, mask) of a plain text and the end token; everything is trained but the first
    token, a BOS where the tokenizer puts one: nothing predicts it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    bos = _bos(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*(bos if ids[:1] != bos else []), *ids, *end]
    return ids, [int(i > 0) for i in range(len(ids))]


def render_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: str | Message,
    options: Options | None = None,
) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer with its end token); the answer is a text, or a message
    with its tool calls or reasoning. Raises `DataError`.
    """
    message = completion
    if isinstance(message, str):
        message = {"role": "assistant", "content": message}
    return _continued(tokenizer, *completion_texts(tokenizer, [*prompt, message], options))


def completion_texts(
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[Message],
    options: Options | None = None,
) -> tuple[str, str]:
    """The template's texts of the prompt and of its answer, the last message, with its end token.
    Raises `DataError`.
    """
    check_said(tokenizer, answered, options)
    return _answer(tokenizer, answered, options)


def render_turn(
    tokenizer: PreTrainedTokenizerBase,
    said: Sequence[Message],
    options: Options | None = None,
) -> list[int]:
    """What follows an answer's end token when these messages come next and the assistant is asked
    again.

    So that an episode goes on from the sampled tokens themselves: they are never encoded a second
    time.
    """
    opening = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    try:
        whole = text_of(tokenizer, [*opening, *said], options, asks=True)
    except DataError:
        if said[0]["role"] != "tool":
            raise
        # This template wants to know what the tool answers.
        opening[1] = _calling(said[0].get("name") or "tool")
        whole = text_of(tokenizer, [*opening, *said], options, asks=True)
    check_said(tokenizer, [*opening, *said], options)
    before, answer = _answer(tokenizer, opening, options)
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
        end = at + len(PROBE) + len(_closing(tokenizer, tail, answer))
    return _continued(tokenizer, whole[:end], whole[end:])[1]


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an assistant's turn: EOS, and those that the template puts there, after
    words and after a tool call. EOS alone where that cannot be told.
    """
    found = {t for t in [tokenizer.eos_token_id] if t is not None}
    for answer in ({"role": "assistant", "content": PROBE}, _calling("tool")):
        try:
            _, text = _answer(tokenizer, [{"role": "user", "content": "a"}, answer], None)
        except DataError:
            continue
        if end := re.search(f"{special_tokens(tokenizer)}$", text):
            found.add(tokenizer.convert_tokens_to_ids(end.group()))
    return frozenset(found)


def _calling(name: str) -> Message:
    call = {"type": "function", "id": "call00001", "function": {"name": name, "arguments": {}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: Options | None
) -> tuple[str, str]:
    """The text that asks for the last message, and what a policy writes after it: the message,
    through its end token. Raises `DataError` if that cannot be told.
    """
    *prompt, message = messages
    before = text_of(tokenizer, prompt, options, asks=True)
    whole = text_of(tokenizer, messages, options)
    probed = text_of(tokenizer, [*prompt, {"role": "assistant", "content": PROBE}], options)
    tail = probed.rpartition(PROBE)[2] if PROBE in probed else ""
    end = _end(tokenizer, whole, tail)
    content = str(with_reasoning(tokenizer, message)["content"])
    answer = None
    if whole.startswith(before):
        answer = whole[len(before) : end]
    # Asked, the template opens the reasoning (`<think>`), which it leaves out of an answer.
    opened = re.search(r"<(\w+)>(\s*)(</\1>\s*)?\Z", before)
    if answer is None and opened and whole.startswith(before[: opened.start()]):
        tag, space, closed = opened.groups()
        rest = whole[opened.start() : end]
        thinks = rest.startswith(f"<{tag}>")
        rest = rest.removeprefix(f"<{tag}>")
        if closed and thinks:
            raise DataError(
                f"an answer gives its reasoning, for which the prompt leaves no place: it has "
                f"closed <{tag}> already. Take one of the two out."
            )
        answer = rest if closed else _thought_first(content, rest, tag).removeprefix(space)
    if answer is None and not has_marks(tokenizer):
        answer = _from_header(tokenizer, prompt, options, probed, whole[:end])
    if answer is None:
        raise _UntoldAnswerError(
            "The chat template renders a prompt differently once it is answered, so the "
            "assistant's tokens cannot be told; give the tokenizer a template whose rendering only "
            "grows, or add {% generation %} marks to it."
        )
    if "</think>" in content and squeezed(content).removeprefix("<think>") not in squeezed(answer):
        raise DataError(left_out("the reasoning of an answer"))
    return before, answer


def _check_end(tokenizer: PreTrainedTokenizerBase, answer: str, message: Message) -> None:
    """Raises `DataError` if a policy would not learn from this answer to end where it ends."""
    end = re.search(f"{special_tokens(tokenizer)}$", answer)
    if not end:
        raise DataError(
            "the chat template writes no end token after an answer, so that a policy would never "
            "learn to end; give the tokenizer a template that does."
        )
    if any(end.group() in str(message.get(key)) for key in ("content", REASONING[0])):
        raise DataError(
            f"an answer has its end token {end.group()} inside; take it out of the row."
        )


def _thought_first(content: str, rest: str, tag: str) -> str:
    """`rest`, as the template writes an answer of this content, with the reasoning that it leaves
    out before it; with its end alone where there is none.
    """
    close = f"</{tag}>"
    thought, given, said = content.rpartition(close)
    thought = thought.lstrip().removeprefix(f"<{tag}>")
    if given and squeezed(thought + close) not in squeezed(rest):
        gap = said[: len(said) - len(said.lstrip())]
        return thought + close + gap + rest.removeprefix(close).lstrip()
    return rest if close in rest else f"\n\n{close}\n\n{rest.lstrip()}"


def _from_header(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    options: Options | None,
    probed: str,
    whole: str,
) -> str | None:
    """What follows the text that opens an answer, asked and answered alike: some templates write
    what stands before the last question differently once it is answered.
    """
    question = {**prompt[-1], "content": MARK}
    asking = text_of(tokenizer, [*prompt[:-1], question], options, asks=True)
    answered = [*prompt[:-1], question, {"role": "assistant", "content": PROBE}]
    header = asking.rpartition(MARK)[2]
    between = text_of(tokenizer, answered, options).rpartition(MARK)[2].partition(PROBE)[0]
    opening = probed.partition(PROBE)[0]
    if MARK not in asking or not header.strip() or not between.startswith(header):
        return None
    start = len(opening) - len(between) + len(header)
    told = opening.endswith(between) and whole.startswith(opening[:start])
    return whole[start:] if told else None


def _end(tokenizer: PreTrainedTokenizerBase, whole: str, tail: str) -> int:
    """Where the last answer's end token ends. `tail`: what the template writes after an answer."""
    special = special_tokens(tokenizer)
    first = re.search(special, tail)
    if whole.endswith(tail):
        return len(whole) - len(tail) + (first.end() if first else len(tail))
    # After a tool call it may be another one: the same if it is among those at the end, or the
    # first of them.
    run = re.search(rf"(?:\s|{special})*\Z", whole)
    assert run
    same = re.compile(re.escape(first.group()) if first else "(?!)")
    found = same.search(whole, run.start()) or re.compile(special).search(whole, run.start())
    return found.end() if found else len(whole)


def _span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    i: int,
    options: Options | None,
    whole: str,
    before: str,
    answer: str,
) -> Span | None:
    """Where answer i stands in the text of the whole conversation; None if it is not there as a
    policy writes it: after the text that asks for it, with all its words, and an end token.
    """
    if whole.startswith(before + answer):
        return len(before), len(before + answer)
    if not whole.startswith(before):
        return None
    probe = {"role": "assistant", "content": PROBE}
    try:
        probed = text_of(tokenizer, [*messages[:i], probe, *messages[i + 1 :]], options)
    except DataError:
        return None
    tail = probed.partition(PROBE)[2]
    closing = _closing(tokenizer, tail, answer)
    start, end = len(before), len(whole) - len(tail) + len(closing)
    if not closing or not whole.endswith(tail) or end < start:
        return None
    words = squeezed(whole[start:end])
    for key in ("content", REASONING[0]):
        said = squeezed(messages[i].get(key) or "")
        if said in squeezed(answer) and said not in words:
            return None
    return start, end


def _closing(tokenizer: PreTrainedTokenizerBase, tail: str, answer: str) -> str:
    """The end token that `tail`, what stands after an earlier answer, begins with; and "" if it has
    none, and begins with the next message.

    It may be another one than the last answer's. What opens a message is followed by the name of a
    role or by the words; an end token by what opens the next one.
    """
    special = special_tokens(tokenizer)
    last = re.search(f"{special}$", answer)
    found = re.match(rf"\s*({special})(\s*(?:{special}|\Z))?", tail)
    if not found:
        return ""
    token, followed = found.groups()
    same = last is not None and token == last.group()
    ends = same or (followed is not None and token != tokenizer.bos_token)
    return tail[: found.end(1)] if ends else ""


def _marked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None,
    untrained: Collection[int],
) -> Rendered:
    """By the template's own marks, one run of them an answer."""
    ids, mask = marked(tokenizer, messages, options)
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
    """Token ids of two texts that follow each other. Where a token would lie across the border, the
    second is encoded alone: a policy writes after the prompt's own tokens.
    """
    first, both = _encode(tokenizer, before), _encode(tokenizer, before + after)
    if both[: len(first)] == first:
        return first, both[len(first) :]
    return first, tokenizer.encode(after, add_special_tokens=False)


def _masked(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Rendered:
    """(ids, mask) of a text: 1 on each token with a character in one of the spans."""
    if not tokenizer.is_fast:  # it gives no offsets
        ids = _encode(tokenizer, text)
        ends = [len(decode(tokenizer, ids[: i + 1])) for i in range(len(ids))]
        parts = zip([0, *ends], ends, strict=False)
        return ids, [int(any(a < end and start < b for start, end in spans)) for a, b in parts]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = _once_bos(tokenizer, encoded["input_ids"]), []
    before = 0
    for start, end in encoded["offset_mapping"]:
        # Some tokenizers leave white space out of a token's offsets.
        start, before = min(start, before), end
        mask.append(int(any(start < last and first < end for first, last in spans)))
    return ids, mask


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return _once_bos(tokenizer, tokenizer.encode(text, add_special_tokens=False))


def _once_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """The ids of a template's text. Raises `DataError` if BOS is there twice."""
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise DataError(
            "The chat template writes the BOS token twice; "
            "take one of the two out of the template or the tokenizer."
        )
    return ids


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer itself puts before a text, if it does."""
    ids: list[int] = tokenizer.encode("a")
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
