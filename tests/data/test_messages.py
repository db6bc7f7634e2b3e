"""What a row says is used, whatever world it comes from, or refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import (
    ChatExample,
    clean,
    load_rows,
    render_conversation,
    to_preference,
    to_prompt,
    to_stepwise,
    to_supervised,
    to_unpaired,
)
from gearshift.data.chat import render_completion, render_prompt, render_turn
from gearshift.data.clean import CleanConfig
from gearshift.errors import DataError
from tests.data.shapes import SHAPES
from tests.oracles.chat_masks import show_mask

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}
FUNCTION = {"name": "look", "arguments": {"at": 1}}
CALL = {"id": "c1", "type": "function", "function": FUNCTION}
TEXT_CALL = {"id": "c1", "type": "function", "function": {**FUNCTION, "arguments": '{"at": 1}'}}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "seen"}
SCHEMA = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": SCHEMA}

CALLED = '<tool_call>look {"at": 1}</tool_call><|im_end|>'
NO_THOUGHT, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n"
YO = "yo<|im_end|>"
# A row, and what of it is trained.
FORMS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        [NO_THOUGHT + CALLED],
    ),
    "words and a call, its result": (
        {
            "tools": [TOOL],
            "messages": [
                USER,
                {"role": "assistant", "content": "Let me look.", "tool_calls": [TEXT_CALL]},
                RESULT,
                BOT,
            ],
        },
        ["Let me look." + CALLED, NO_THOUGHT + YO],
    ),
    "tools and calls in texts": (
        {
            "tools": json.dumps([SCHEMA]),
            "messages": json.dumps([USER, {"role": "assistant", "tool_calls": [TEXT_CALL]}]),
        },
        [NO_THOUGHT + CALLED],
    ),
    "a call of old": ({"messages": [USER, {**BOT, "function_call": FUNCTION}]},
                      [NO_THOUGHT + "yo" + CALLED]),
    **{
        key: ({"messages": [USER, {**BOT, key: "hm"}]}, [THOUGHT + YO])
        for key in ("reasoning_content", "reasoning", "thinking")
    },
    "parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "y"},
                {"type": "text", "text": "o"}]},
        ]},
        [THOUGHT + YO],
    ),
    **{
        f"{key} {no}": ({"messages": [USER, {**BOT, key: no}, USER, {**BOT, key: yes}]},
                   [NO_THOUGHT + YO])
        for key, no, yes in (
            ("weight", 0, 1), ("train", False, True), ("training", 0, 1), ("loss", False, None))
    },
    "an instructor": ({"messages": [{"role": "developer", "content": "S."}, USER, BOT]},
                      [NO_THOUGHT + YO]),
    "sharegpt": (
        {
            "system": "S.", "tools": json.dumps([SCHEMA]),
            "conversations": [
                HUMAN, {"from": "function_call", "value": json.dumps(FUNCTION)},
                {"from": "observation", "value": "seen"}, GPT,
            ],
        },
        [CALLED, NO_THOUGHT + YO],
    ),
    "sharegpt's flags": ({"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, GPT]},
                         [NO_THOUGHT + YO]),
    "alpaca's history": (
        {"instruction": "hi", "input": "", "output": "yo", "system": "S.",
         "history": [["a", "b"], ["c", "d"]]},
        ["b<|im_end|>", "d<|im_end|>", NO_THOUGHT + YO],
    ),
    "arguments of the template": (
        {"messages": [USER, BOT], "chat_template_kwargs": {"enable_thinking": False}}, [YO]),
    "a prompt's answers are not learned": (
        {"prompt": [USER, BOT, USER], "completion": "yo"}, [NO_THOUGHT + YO]),
    "a completion of several": (
        {"prompt": "hi", "tools": [TOOL],
         "completion": [{"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, BOT]},
        [CALLED, NO_THOUGHT + YO],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_trains_what_it_says(form: str) -> None:
    row, right = FORMS[form]
    [kept], _ = clean([row], CleanConfig())
    example = to_supervised(kept)
    assert isinstance(example, ChatExample)
    tokenizer = SHAPES["thinking"]
    [(ids, mask)] = render_conversation(
        tokenizer, example.messages, example.options, example.untrained
    )
    shown = show_mask(tokenizer, ids, mask)
    assert [part.partition("»")[0] for part in shown.split("«")[1:]] == right
    whole = [token for part in right for token in tokenizer.encode(part, add_special_tokens=False)]
    assert sum(mask) == len(whole)
    for said in ("system", "tools"):
        assert (said not in row) or ("S." in shown if said == "system" else "Looks." in shown)


def test_a_template_sees_all_that_a_message_has_also_without_words() -> None:
    """A message of OpenAI's clients, which no row has been: null or nothing in place of words."""
    tokenizer = SHAPES["thinking"]
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT]}
    wanted = tokenizer.decode(render_prompt(tokenizer, to_prompt(row).prompt, {"tools": [TOOL]}))
    assert all(part in wanted for part in ("Looks.", CALLED, "seen"))
    for words in ({"content": None}, {}):
        call = {"role": "assistant", "tool_calls": [TEXT_CALL], **words}
        ids = render_prompt(tokenizer, [USER, call, RESULT], {"tools": [TOOL]})
        assert tokenizer.decode(ids) == wanted
        _, answer = render_completion(tokenizer, [USER], {**call, "reasoning_content": "hm"})
        assert tokenizer.decode(answer) == "<think>\nhm\n</think>\n\n" + CALLED
        assert render_turn(tokenizer, [RESULT], {"tools": [TOOL]})


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (to_supervised, {"messages": [USER, {**BOT, "emotion": "glad"}]}, "`emotion`, which is not"),
    (to_supervised, {"messages": [USER, {**BOT, "weight": 0.5}]}, "`weight` of a message is 0.5"),
    (to_supervised, {"messages": [USER, {**BOT, "weight": 0}]}, "no answer .* to be trained"),
    (to_supervised, {"messages": [USER, {**BOT, "weight": 0, "train": True}]}, "contradict each"),
    (to_supervised, {"messages": [{**USER, "train": True}, BOT]}, "only answers are"),
    (to_supervised, {"messages": [{**USER, "tool_calls": [CALL]}, BOT]}, "only an assistant has"),
    (to_supervised, {"messages": [USER, {**BOT, "tool_calls": [{"id": "c"}]}]}, "function's"),
    (to_supervised, {"messages": [USER, {**BOT, "tool_calls": "look()"}]}, "not JSON"),
    (to_supervised, {"messages": [USER, {**BOT, "tool_calls": [{**CALL, "x": 1}]}]}, "`x`"),
    (to_supervised, {"messages": [USER, {**BOT, "thinking": "a", "reasoning": "b"}]}, "twice"),
    (to_supervised, {"messages": [{**USER, "content": [{"type": "image"}]}, BOT]}, "only text"),
    (to_supervised, {"messages": [USER, BOT], "images": ["a.png"]}, "`images` is not used"),
    (to_supervised, {"text": "a", "system": "S."}, "`system` is not used"),
    (to_supervised, {"text": "a", "tools": [TOOL]}, "`tools` is not used"),
    (to_supervised, {"prompt": "a", "completion": "b", "input": "c"}, "`input` is not used"),
    (to_supervised, {"prompt": "a b", "messages": [USER, BOT]}, "`prompt` is not used"),
    (to_supervised, {"prompt": "Q?", "text": "Answer."}, "`prompt` is not used"),
    (to_supervised, {"instruction": "Do.", "prompt": "This.", "output": "b"}, "`prompt` is not"),
    (to_supervised, {"instruction": "Q?", "context": "That.", "output": "b"}, "`context` is not"),
    (to_supervised, {"messages": [USER, BOT], "conversations": [HUMAN, {**GPT, "value": "no"}]},
     "`conversations` is not used"),
    (to_preference, {"prompt": "a", "instruction": "Do.", "chosen": "b", "rejected": "c"},
     "`instruction` is not used"),
    (to_supervised, {"messages": [USER, BOT], "tools": [TOOL], "functions": [{"name": "a"}]},
     "`functions` differ"),
    (to_supervised, {"text": "a", "system_prompt": "S."}, "`system_prompt` is not used"),
    (to_supervised, {"messages": [USER, BOT], "system": "a", "system_prompt": "b"},
     "`system_prompt` is not the conversation's own"),
    (to_supervised, {"messages": [USER, {**BOT, "reasoning_content": "a",
                                         "content": "<think>b</think>c"}]}, "reasoning twice"),
    (to_supervised, {"messages": [USER, {**BOT, "refusal": "I will not."}]}, "`refusal`"),
    (to_unpaired, {"conversations": [HUMAN, GPT], "kto_tag": True}, "the keys are conversations"),
    (to_preference, {"prompt": "a", "chosen": "b", "rejected": "c", "history": [["d", "e"]]},
     "`history` is not used"),
    (to_supervised, {"messages": [USER, BOT], "tools": [{"a": 1}]}, "`tools` has"),
    (to_supervised, {"messages": [USER, BOT], "tools": "look"}, "`tools` is 'look'"),
    (to_supervised, {"messages": [USER, BOT], "chat_template_kwargs": [1]}, "an object"),
    (to_supervised, {"messages": [{"role": "system", "content": "a"}, USER, BOT], "system": "b"},
     "not the conversation's own"),
    (to_supervised, {"instruction": "a", "output": "b", "history": ["c"]}, "pairs"),
    (to_supervised, {"conversations": [HUMAN, {"from": "function_call", "value": "look"}]}, "JSON"),
    (to_preference, {"prompt": "a", "chosen": [{**BOT, "train": False}], "rejected": "b"}, "flag"),
    (to_preference, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "nan"}, "`margin`"),
    (to_preference, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "`margin`"),
    (to_unpaired, {"prompt": "a", "completion": "b", "label": "maybe"}, "`label` is 'maybe'"),
]  # fmt: skip


@pytest.mark.parametrize(("convert", "row", "named"), BAD, ids=lambda v: str(v)[:30])
def test_the_rest_is_refused_by_name(
    convert: Any, row: dict[str, Any], named: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{named}") as error:
        convert(load_rows(str(tmp_path / "a.jsonl"))[0])
    assert "\n" not in str(error.value)


ALIKE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "the system's words by another name": (
        to_supervised,
        {"messages": [USER, BOT], "system_prompt": "S."},
        {"messages": [USER, BOT], "system": "S."},
    ),
    "and for a reward": (
        to_prompt,
        {"prompt": "hi", "system_prompt": "S.", "gold": "yo"},
        {"prompt": "hi", "system": "S.", "gold": "yo"},
    ),
    "functions": (
        to_supervised,
        {"messages": [USER, BOT], "functions": [SCHEMA]},
        {"messages": [USER, BOT], "tools": [TOOL]},
    ),
    "what is given but empty": (
        to_supervised,
        {"messages": [USER, {**BOT, "annotations": [], "refusal": ""}], "images": [], "tools": []},
        {"messages": [USER, BOT]},
    ),
    "a tool by another name": (
        to_supervised,
        {"messages": [USER, BOT, {"role": "ipython", "content": "3"}, BOT]},
        {"messages": [USER, BOT, {"role": "tool", "content": "3"}, BOT]},
    ),
    "words that are said twice": (
        to_supervised,
        {"messages": [USER, BOT], "prompt": "hi", "input": " hi", "output": "yo", "score": 3,
         "text": "### Human: hi\n### Assistant: yo", "conversations": [HUMAN, GPT]},
        {"messages": [USER, BOT]},
    ),
    "alpaca's prompt written out": (
        to_supervised,
        {"instruction": "Add.", "input": "1", "output": "2", "prompt": "Below: Add.\n\n1"},
        {"instruction": "Add.", "input": "1", "output": "2"},
    ),
    "a JSON object with a role": (
        to_supervised,
        {"messages": [USER, {**BOT, "content": '{"role": "admin"}'}]},
        {"prompt": "hi", "completion": '{"role": "admin"}'},
    ),
    "compared after a conversation's question": (
        to_preference,
        {"messages": [USER], "chosen": BOT, "rejected": {**BOT, "content": "no"}},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
    ),
    "compared conversations beside their last question": (
        to_preference,
        {"prompt": "so", "chosen": [USER, BOT, {**USER, "content": "so"}, BOT],
         "rejected": [USER, BOT, {**USER, "content": "so"}, {**BOT, "content": "no"}]},
        {"prompt": [USER, BOT, {**USER, "content": "so"}], "chosen": "yo", "rejected": "no"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_rows_that_say_the_same_are_read_alike(name: str) -> None:
    convert, row, same = ALIKE[name]
    assert convert(row) == convert(same)


@pytest.mark.parametrize("empty", ["", None])
def test_a_row_of_no_format_is_refused_though_its_system_message_is_empty(empty: Any) -> None:
    rows, report = clean([{"system_prompt": empty, "question": "a", "response": "b"},
                          {"system_prompt": "S.", "question": "c", "response": "d"}],
                         CleanConfig())  # fmt: skip
    assert report.empty == 0
    with pytest.raises(DataError, match="the keys are"):
        to_supervised(rows[0])


def test_judged_answers_may_be_calls_and_have_reasons() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    example = to_preference(
        {"prompt": "hi", "chosen": [call], "rejected": [BOT], "tools": [TOOL], "system": "S."}
    )
    assert [m["role"] for m in example.prompt] == ["system", "user"]
    assert (example.rejected, example.options) == ("yo", {"tools": [TOOL]})
    tokenizer = SHAPES["thinking"]
    prompt, answer = render_completion(tokenizer, example.prompt, example.chosen, example.options)
    assert tokenizer.decode(answer) == NO_THOUGHT + CALLED and "Looks." in tokenizer.decode(prompt)
    sharegpt = {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "no"}}
    example = to_preference(sharegpt)
    assert (example.prompt, example.chosen, example.rejected) == ([USER], "yo", "no")
    judged = to_unpaired({"prompt": "hi", "completion": [{**BOT, "reasoning": "hm"}], "label": 1.0})
    assert getattr(judged, "completion", None) == {**BOT, "reasoning_content": "hm"}
    steps = to_stepwise({"prompt": "hi", "completions": '["a", "b"]', "labels": "[true, 0]"})
    assert (steps.steps, steps.labels) == (["a", "b"], [True, False])


def test_a_prompt_takes_its_tools_and_system_and_leaves_the_users_columns() -> None:
    row = {"prompt": "hi", "system": "S.", "tools": [SCHEMA], "image": "a.png", "id": 7, "note": ""}
    example = to_prompt(row)
    assert example.prompt == [{"role": "system", "content": "S."}, USER]
    assert example.options == {"tools": [TOOL]}
    assert example.columns == {"image": "a.png", "id": 7}
