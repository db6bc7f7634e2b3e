"""Finds where an answer stands in a chat template's text, and what a policy must write there.

It compares texts: that of the conversation before the answer, that of the conversation with the
answer, and the same texts with probes in place of the messages' words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat_template import (
    MARK,
    PROBE,
    REASONING,
    TemplateOptions,
    has_generation_marks,
    left_out_message,
    no_spaces,
    prefetch_texts,
    render_template,
    special_token_pattern,
    with_reasoning,
)
from gearshift.errors import DataError
from gearshift.types import Message

Span = tuple[int, int]


class AmbiguousAnswerError(DataError):
    """The template's text does not show where an answer begins."""


def prefetch_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: TemplateOptions | None,
) -> None:
    """Render at once all texts that `prompt_and_answer` needs for these conversations."""
    probe = {"role": "assistant", "content": PROBE}
    needed = [
        pair
        for messages in conversations
        for pair in (
            (messages[:-1], True),
            (messages, False),
            ([*messages[:-1], probe], False),
        )
    ]
    prefetch_texts(tokenizer, needed, options)


def prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], options: TemplateOptions | None
) -> tuple[str, str]:
    """The text that asks for the last message, and the text that a policy writes after it: the
    message and its end token. Raises `DataError` if the texts do not show it.
    """
    *prompt, message = messages
    before = render_template(tokenizer, prompt, options, asks=True)
    whole = render_template(tokenizer, messages, options)
    probed = render_template(tokenizer, [*prompt, {"role": "assistant", "content": PROBE}], options)
    tail = probed.rpartition(PROBE)[2] if PROBE in probed else ""
    end = _end(tokenizer, whole, tail)
    content = str(with_reasoning(tokenizer, message).get("content") or "")
    answer = None
    if whole.startswith(before):
        answer = whole[len(before) : end]
    # When a template asks for an answer, it may open the reasoning (`<think>`) that it leaves out
    # of a complete answer.
    opened = re.search(r"<(\w+)>(\s*)(</\1>\s*)?\Z", before)
    if answer is None and opened and whole.startswith(before[: opened.start()]):
        tag, space, closed = opened.groups()
        rest = whole[opened.start() : end]
        thinks = rest.startswith(f"<{tag}>")
        rest = rest.removeprefix(f"<{tag}>")
        if closed and thinks:
            raise DataError(
                f"an answer has reasoning, but its prompt has already closed <{tag}>; take one "
                "of the two out."
            )
        answer = rest if closed else _thought_first(content, rest, tag).removeprefix(space)
    if answer is None and not has_generation_marks(tokenizer):
        answer = _from_header(tokenizer, prompt, options, probed, whole[:end])
    if answer is None:
        raise AmbiguousAnswerError(
            "The chat template renders a prompt differently once it is answered, so the "
            "assistant's tokens cannot be found; give the tokenizer a template whose rendering "
            "only "
            "grows, or add {% generation %} marks to it."
        )
    if "</think>" in content and no_spaces(content).removeprefix("<think>") not in no_spaces(
        answer
    ):
        raise DataError(left_out_message("the reasoning of an answer"))
    return before, answer


def _thought_first(content: str, rest: str, tag: str) -> str:
    """`rest`, the template's text of an answer with this content, preceded by the reasoning that
    the template leaves out; if there is no reasoning, by the closing tag only.
    """
    close = f"</{tag}>"
    thought, given, said = content.rpartition(close)
    thought = thought.lstrip().removeprefix(f"<{tag}>")
    if given and no_spaces(thought + close) not in no_spaces(rest):
        gap = said[: len(said) - len(said.lstrip())]
        return thought + close + gap + rest.removeprefix(close).lstrip()
    return rest if close in rest else f"\n\n{close}\n\n{rest.lstrip()}"


def _from_header(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    options: TemplateOptions | None,
    probed: str,
    whole: str,
) -> str | None:
    """The text after the header that opens an answer, which is the same with and without the
    answer: some templates change the text before the last question once it is answered.
    """
    question = {**prompt[-1], "content": MARK}
    asking = render_template(tokenizer, [*prompt[:-1], question], options, asks=True)
    answered = [*prompt[:-1], question, {"role": "assistant", "content": PROBE}]
    header = asking.rpartition(MARK)[2]
    between = render_template(tokenizer, answered, options).rpartition(MARK)[2].partition(PROBE)[0]
    opening = probed.partition(PROBE)[0]
    if MARK not in asking or not header.strip() or not between.startswith(header):
        return None
    start = len(opening) - len(between) + len(header)
    matches = opening.endswith(between) and whole.startswith(opening[:start])
    return whole[start:] if matches else None


def _end(tokenizer: PreTrainedTokenizerBase, whole: str, tail: str) -> int:
    """Where the last answer's end token ends. `tail` is what the template writes after an
    answer.
    """
    special = special_token_pattern(tokenizer)
    first = re.search(special, tail)
    if whole.endswith(tail):
        return len(whole) - len(tail) + (first.end() if first else len(tail))
    # After a tool call the end token may be a different one: take the same token if it is among
    # those at the end, otherwise the first of them.
    run = _trailing(whole, special)
    same = re.compile(re.escape(first.group()) if first else "(?!)")
    found = same.search(whole, run) or re.compile(special).search(whole, run)
    return found.end() if found else len(whole)


def _trailing(text: str, special: str) -> int:
    """The position of the white space and special tokens at the end of a text.

    It is one pass: a pattern for all of it would start again at each space of a long run of spaces.
    """
    start = len(text)
    for token in [*reversed(list(re.finditer(special, text))), None]:
        while start and text[start - 1].isspace():
            start -= 1
        if token is None or token.end() < start:
            break
        start = min(start, token.start())
    return start


def answer_span(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    i: int,
    options: TemplateOptions | None,
    whole: str,
    before: str,
    answer: str,
) -> Span | None:
    """Where answer i stands in the text of the whole conversation. None if it is not there as a
    policy writes it: after the text that asks for it, with all its words, and with an end token.
    """
    if whole.startswith(before + answer):
        return len(before), len(before + answer)
    if not whole.startswith(before):
        return None
    probe = {"role": "assistant", "content": PROBE}
    try:
        probed = render_template(tokenizer, [*messages[:i], probe, *messages[i + 1 :]], options)
    except DataError:
        return None
    tail = probed.partition(PROBE)[2]
    closing = closing_token(tokenizer, tail, answer)
    start, end = len(before), len(whole) - len(tail) + len(closing)
    if not closing or not whole.endswith(tail) or end < start:
        return None
    thinks = messages[i].get(REASONING[0]) or "</think>" in (messages[i].get("content") or "")
    said = re.sub(f"{special_token_pattern(tokenizer)}$", "", answer)
    if thinks and no_spaces(said) != no_spaces(whole[start : end - len(closing)]):
        return None
    return start, end


def closing_token(tokenizer: PreTrainedTokenizerBase, tail: str, answer: str) -> str:
    """The end token at the start of `tail`, the text after an earlier answer; "" if it starts with
    the next message instead.

    It may differ from the last answer's end token. A token that opens a message is followed by the
    name of a role or by words; an end token is followed by a token that opens the next message.
    """
    special = special_token_pattern(tokenizer)
    last = re.search(f"{special}$", answer)
    found = re.match(rf"\s*({special})(\s*(?:{special}|\Z))?", tail)
    if not found:
        return ""
    token, followed = found.groups()
    same = last is not None and token == last.group()
    ends = same or (followed is not None and token != tokenizer.bos_token)
    return tail[: found.end(1)] if ends else ""
