"""Where an answer stands in a chat template's text, and what a policy writes of it.

It is told by comparing texts: of the conversation that asks and of the one that is answered, and of
the same ones with probes in the place of the words.
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
    """The template does not let an answer be told from what stands before it."""


def prefetch_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    options: TemplateOptions | None,
) -> None:
    """Have what `written_answer` needs of these conversations made at once."""
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
    """The text that asks for the last message, and what a policy writes after it: the message,
    through its end token. Raises `DataError` if that cannot be told.
    """
    *prompt, message = messages
    before = render_template(tokenizer, prompt, options, asks=True)
    whole = render_template(tokenizer, messages, options)
    probed = render_template(tokenizer, [*prompt, {"role": "assistant", "content": PROBE}], options)
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
    if answer is None and not has_generation_marks(tokenizer):
        answer = _from_header(tokenizer, prompt, options, probed, whole[:end])
    if answer is None:
        raise AmbiguousAnswerError(
            "The chat template renders a prompt differently once it is answered, so the "
            "assistant's tokens cannot be told; give the tokenizer a template whose rendering only "
            "grows, or add {% generation %} marks to it."
        )
    if "</think>" in content and no_spaces(content).removeprefix("<think>") not in no_spaces(
        answer
    ):
        raise DataError(left_out_message("the reasoning of an answer"))
    return before, answer


def _thought_first(content: str, rest: str, tag: str) -> str:
    """`rest`, as the template writes an answer of this content, with the reasoning that it leaves
    out before it; with its end alone where there is none.
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
    """What follows the text that opens an answer, asked and answered alike: some templates write
    what stands before the last question differently once it is answered.
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
    told = opening.endswith(between) and whole.startswith(opening[:start])
    return whole[start:] if told else None


def _end(tokenizer: PreTrainedTokenizerBase, whole: str, tail: str) -> int:
    """Where the last answer's end token ends. `tail`: what the template writes after an answer."""
    special = special_token_pattern(tokenizer)
    first = re.search(special, tail)
    if whole.endswith(tail):
        return len(whole) - len(tail) + (first.end() if first else len(tail))
    # After a tool call it may be another one: the same if it is among those at the end, or the
    # first of them.
    run = _trailing(whole, special)
    same = re.compile(re.escape(first.group()) if first else "(?!)")
    found = same.search(whole, run) or re.compile(special).search(whole, run)
    return found.end() if found else len(whole)


def _trailing(text: str, special: str) -> int:
    """Where the white space and the special tokens begin that a text ends with.

    One pass: a pattern for all of it would begin anew at each space inside a long run of them.
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
    """Where answer i stands in the text of the whole conversation; None if it is not there as a
    policy writes it: after the text that asks for it, with all its words, and an end token.
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
    thinks = messages[i].get(REASONING[0]) or "</think>" in messages[i]["content"]
    said = re.sub(f"{special_token_pattern(tokenizer)}$", "", answer)
    if thinks and no_spaces(said) != no_spaces(whole[start : end - len(closing)]):
        return None
    return start, end


def closing_token(tokenizer: PreTrainedTokenizerBase, tail: str, answer: str) -> str:
    """The end token that `tail`, what stands after an earlier answer, begins with; and "" if it has
    none, and begins with the next message.

    It may be another one than the last answer's. What opens a message is followed by the name of a
    role or by the words; an end token by what opens the next one.
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
