"""Templates that write an answer in more than one way: what is trained is what a policy writes."""

from typing import Any

import pytest

from gearshift.data.chat import (
    end_token_ids,
    render_completion,
    render_conversation,
    render_prompt,
    render_supervised,
    render_turn,
)
from gearshift.errors import DataError
from gearshift.types import Message
from tests.data.shapes import SHAPES, shaped
from tests.oracles.chat_masks import show_mask

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
AGAIN, THEN = {"role": "user", "content": "so"}, {"role": "assistant", "content": "ok"}
SYSTEM = {"role": "system", "content": "S."}
THOUGHT = {**BOT, "reasoning_content": "hm"}
INLINE = {**BOT, "content": "<think>\nhm\n</think>\n\nyo"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "it's"}}}],
}
SPOKEN = {**CALL, "content": "Let me look."}
RESULT = {"role": "tool", "content": 'a "b"'}
TOOLS = {"tools": [{"type": "function", "function": {"name": "look", "description": "Looks."}}]}
C = "<|start|>system<|message|>You help.<|end|><|start|>user<|message|>hi<|end|><|start|>assistant"
Q = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
Q2 = "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"
D = "<s><|header|>system<|/header|>\n\nToday: 1\n\n<|eot|><|header|>user<|/header|>\n\nhi<|eot|>"

# Trained tokens stand between « and ».
CASES: list[tuple[str, list[Message], dict[str, Any], list[str]]] = [
    ("channels", [USER, BOT], {}, [C + "«<|channel|>final<|message|>yo<|return|>»"]),
    ("channels", [USER, BOT, AGAIN, THEN], {}, [
        C + "«<|channel|>final<|message|>yo<|end|>»<|start|>user<|message|>so<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>ok<|return|>»"]),
    ("channels", [USER, THOUGHT], {}, [
        C + "«<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>yo<|return|>»"]),
    # The whole drops the first answer's thoughts: they are learned in a sequence of their own.
    ("channels", [USER, THOUGHT, AGAIN, THEN], {}, [
        C + "<|channel|>final<|message|>yo<|end|><|start|>user<|message|>so<|end|>"
        "<|start|>assistant«<|channel|>final<|message|>ok<|return|>»",
        C + "«<|channel|>analysis<|message|>hm<|end|>"
        "<|start|>assistant<|channel|>final<|message|>yo<|return|>»"]),
    ("channels", [USER, SPOKEN, RESULT, THEN], {}, [
        C + "«<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant to=look"
        '<|channel|>commentary<|message|>{"at": "it\'s"}<|call|>»<|start|>look to=assistant'
        '<|message|>"a \\"b\\""<|end|><|start|>assistant«<|channel|>final<|message|>ok'
        "<|return|>»"]),
    ("opened", [USER, BOT], {}, ["<s><User>hi<Assistant><think>\n«\n</think>\n\nyo</s>»"]),
    ("opened", [USER, INLINE], {}, ["<s><User>hi<Assistant><think>\n«hm\n</think>\n\nyo</s>»"]),
    ("opened", [USER, {**BOT, "content": "hm\n</think>\n\nyo"}], {}, [
        "<s><User>hi<Assistant><think>\n«hm\n</think>\n\nyo</s>»"]),
    ("opened", [SYSTEM, USER, THOUGHT], {}, [
        "<s>S.<User>hi<Assistant><think>\n«hm\n</think>\n\nyo</s>»"]),
    ("opened", [USER, BOT, AGAIN, INLINE], {}, [
        "<s><User>hi<Assistant><think>\n«\n</think>\n\nyo</s>»",
        "<s><User>hi<Assistant>yo</s><User>so<Assistant><think>\n«hm\n</think>\n\nyo</s>»"]),
    ("closed", [USER, BOT, AGAIN, THEN], {}, [
        "<s><User>hi<Assistant></think>«yo</s>»<User>so<Assistant></think>«ok</s>»"]),
    ("closed", [USER, BOT], {"thinking": True}, [
        "<s><User>hi<Assistant><think>«</think>yo</s>»"]),
    ("closed", [USER, {**BOT, "content": "<think>hm</think>yo"}], {"thinking": True}, [
        "<s><User>hi<Assistant><think>«hm</think>yo</s>»"]),
    ("thinking", [USER, BOT, AGAIN, THEN], {}, [
        Q + "«yo<|im_end|>»" + Q2 + "«<think>\n\n</think>\n\nok<|im_end|>»\n"]),
    ("thinking", [USER, THOUGHT], {}, [Q + "«<think>\nhm\n</think>\n\nyo<|im_end|>»\n"]),
    ("thinking", [USER, INLINE], {}, [Q + "«<think>\nhm\n</think>\n\nyo<|im_end|>»\n"]),
    ("thinking", [USER, {**BOT, "reasoning_content": "o"}, AGAIN, THEN], {}, [
        Q + "yo<|im_end|>" + Q2 + "«<think>\n\n</think>\n\nok<|im_end|>»\n",
        Q + "«<think>\no\n</think>\n\nyo<|im_end|>»"]),
    ("thinking", [USER, THOUGHT, AGAIN, THEN], {}, [
        Q + "yo<|im_end|>" + Q2 + "«<think>\n\n</think>\n\nok<|im_end|>»\n",
        Q + "«<think>\nhm\n</think>\n\nyo<|im_end|>»"]),
    ("thinking", [USER, BOT], {"enable_thinking": False}, [
        Q + "<think>\n\n</think>\n\n«yo<|im_end|>»\n"]),
    ("thinking", [USER, SPOKEN, RESULT, THEN], {}, [
        Q + "«Let me look.<tool_call>look {\"at\": \"it's\"}</tool_call><|im_end|>»\n"
        '<|im_start|>tool\na "b"<|im_end|>\n<|im_start|>assistant\n'
        "«<think>\n\n</think>\n\nok<|im_end|>»\n"]),
    ("instructed", [{**USER, "content": " hi "}, BOT, AGAIN, THEN], {}, [
        "<s>[INST] hi[/INST]« yo</s>»[INST] so[/INST]« ok</s>»"]),
    ("instructed", [SYSTEM, USER, BOT, AGAIN, THEN], {}, [
        "<s>[INST] S.\n\nhi[/INST]« yo</s>»",
        "<s>[INST] hi[/INST] yo</s>[INST] S.\n\nso[/INST]« ok</s>»"]),
    ("endless", [USER, BOT, AGAIN, THEN], {}, [
        "<s>[INST] hi [/INST] yo[INST] so [/INST]« ok</s>»", "<s>[INST] hi [/INST]« yo</s>»"]),
    ("model", [USER, {**BOT, "content": "yo\n"}], {}, [
        "<s><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n«yo<end_of_turn>»\n"]),
    ("dated", [USER, BOT], {"date_string": "1"}, [
        D + "<|header|>assistant<|/header|>\n\n«yo<|eot|>»"]),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "messages", "options", "right"), CASES, ids=lambda v: str(v)[:9])
def test_exactly_what_a_policy_writes_is_trained(
    shape: str, messages: list[Message], options: dict[str, Any], right: list[str]
) -> None:
    tokenizer = SHAPES[shape]
    rendered = render_conversation(tokenizer, messages, options)
    assert sorted(show_mask(tokenizer, *one) for one in rendered) == sorted(right)
    # A policy asked for the last answer reads the same, and writes the same.
    prompt, answer = render_completion(tokenizer, messages[:-1], messages[-1], options)
    assert prompt == render_prompt(tokenizer, messages[:-1], options)
    written = show_mask(tokenizer, [*prompt, *answer], [0] * len(prompt) + [1] * len(answer))
    last = written.rpartition("«")[2].removesuffix("»")
    assert any(f"«{last}»" in one for one in right)
    if len(right) == 1:
        assert render_supervised(tokenizer, messages, options) == rendered[0]
    else:
        with pytest.raises(DataError, match=r"sequence of its own.*generation"):
            render_supervised(tokenizer, messages, options)


@pytest.mark.parametrize(
    ("shape", "messages", "options", "named"),
    [
        ("opened", [USER, CALL, RESULT, THEN], {}, "leaves out `tool_calls` of message 2"),
        ("opened", [USER, BOT], TOOLS, "leaves out `tools`"),
        ("thinking", [{**USER, "name": "Ann"}, BOT], {}, "leaves out `name` of message 1"),
        ("thinking", [USER, BOT], {"enable_thinkin": False}, "does not read `enable_thinkin`"),
        ("instructed", [USER, THOUGHT], {}, "leaves out `reasoning_content`"),
        ("instructed", [USER, AGAIN, BOT], {}, "refuses this conversation: roles must alternate"),
        ("model", [SYSTEM, USER, BOT], {}, "refuses this conversation: no system role"),
        ("model", [USER, SPOKEN, RESULT, THEN], {}, "leaves out `tool_calls`"),
        ("channels", [USER, BOT, RESULT, THEN], {}, "refuses this conversation: there is no call"),
        ("unended", [USER, BOT], {}, "writes no end token"),
        ("closed", [USER, INLINE], {}, "leaves out the reasoning"),
        ("thinking", [USER, THOUGHT], {"enable_thinking": False}, "has already closed <think>"),
        ("dated", [USER, {**BOT, "content": "yo<|eot|>"}], {}, "end token <|eot|> inside"),
    ],
)
def test_what_would_vanish_or_cannot_be_told_is_refused(
    shape: str, messages: list[Message], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError) as error:
        render_conversation(SHAPES[shape], messages, options)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_answers_that_are_not_trained_are_read_all_the_same() -> None:
    rendered = render_conversation(SHAPES["thinking"], [USER, BOT, AGAIN, THEN], {}, {1})
    assert [show_mask(SHAPES["thinking"], *one) for one in rendered] == [
        Q + "yo<|im_end|>" + Q2 + "«<think>\n\n</think>\n\nok<|im_end|>»\n"
    ]


TURNS = {
    "channels": "<|start|>user<|message|>so<|end|><|start|>assistant",
    "opened": "<User>so<Assistant><think>\n",
    "closed": "<User>so<Assistant></think>",
    "thinking": Q2,
    "instructed": "[INST] so[/INST]",
    "endless": "[INST] so [/INST]",
    "model": "\n<start_of_turn>user\nso<end_of_turn>\n<start_of_turn>model\n",
    "dated": "<|header|>user<|/header|>\n\nso<|eot|><|header|>assistant<|/header|>\n\n",
    "unended": "<|user|>\nso<|assistant|>",
}


@pytest.mark.parametrize("shape", TURNS)
def test_the_next_turn_is_what_follows_the_end_token(shape: str) -> None:
    tokenizer = SHAPES[shape]
    assert tokenizer.decode(render_turn(tokenizer, [AGAIN])) == TURNS[shape]


def test_a_tools_turn() -> None:
    named = {**RESULT, "name": "look"}
    assert SHAPES["channels"].decode(render_turn(SHAPES["channels"], [named])) == (
        '<|start|>look to=assistant<|message|>"a \\"b\\""<|end|><|start|>assistant'
    )
    with pytest.raises(DataError, match=r"leaves out `content` of message 3 \(tool\)"):
        render_turn(SHAPES["opened"], [RESULT])


def test_what_ends_an_answer_of_each() -> None:
    ends = {
        name: set(tokenizer.convert_ids_to_tokens(end_token_ids(tokenizer)))
        for name, tokenizer in SHAPES.items()
    }
    assert ends == {
        "channels": {"<|return|>", "<|call|>"},
        "opened": {"</s>"},
        "closed": {"</s>"},
        "thinking": {"<|im_end|>"},
        "instructed": {"</s>"},
        "endless": {"</s>"},
        "model": {"</s>", "<end_of_turn>"},
        "dated": {"<|eot|>"},
        "unended": {"<|endoftext|>"},
    }


def test_a_template_that_cannot_be_analysed_ends_in_eos() -> None:
    tokenizer = shaped("{{ raise_exception('never') }}", "<s>", "</s>")
    assert end_token_ids(tokenizer) == {tokenizer.eos_token_id}


def test_without_offsets_the_mask_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, chat = SHAPES["dated"], [USER, BOT, AGAIN, THEN]
    right = render_supervised(tokenizer, chat)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert render_supervised(tokenizer, chat) == right
