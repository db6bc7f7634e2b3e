"""Rows that nearly have a format get an error with the mistake and the place."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from gearshift.data import CleanConfig, clean, load_rows, to_preference, to_prompt, to_supervised
from gearshift.errors import DataError

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SAID = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"messages": [USER, BOT]},
        {"conversations": SAID},
        {"instruction": "hi", "input": ""},
    ],
)
def test_a_prompt_keeps_the_other_columns(row: dict[str, Any]) -> None:
    example = to_prompt({**row, "answer": 4})
    assert (example.prompt, example.columns) == ([USER], {"answer": 4})


def test_a_conversation_that_ends_with_a_question_is_a_prompt() -> None:
    assert to_prompt({"messages": [USER, BOT, USER]}).prompt == [USER, BOT, USER]


BAD = [
    (to_supervised, {"messages": [BOT, USER, BOT]}, "begins with the assistant"),
    (to_supervised, {"messages": [{"role": [], "content": "x"}]}, "role"),
    (to_supervised, {"conversations": [{"from": [], "value": "x"}]}, "from"),
    (to_supervised, {"conversations": [{"value": "x"}]}, "from"),
    (to_supervised, {"instruction": "a", "input": 3, "output": "b"}, "input"),
    (to_preference, {"chosen": [USER, USER], "rejected": [USER, BOT]}, "chosen"),
    (to_preference, {"chosen": "a", "rejected": "b"}, "without a `prompt`"),
    (to_preference, {"prompt": "a", "chosen": [BOT, USER, BOT], "rejected": "b"}, "one assistant"),
    (to_prompt, {"prompt": [USER, BOT]}, "completion"),
    (to_prompt, {"prompt": {"a": 1}}, "list of messages"),
]


@pytest.mark.parametrize(("convert", "row", "named"), BAD, ids=lambda v: str(v)[:40])
def test_bad_rows_are_named(
    convert: Callable[[Mapping[str, Any]], object], row: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=named) as error:
        convert(row)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"question": "a"}', "question"),
        ('{"prompt": 3, "completion": "b"}', "`prompt` is 3"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"messages": "hi"}', "list of messages"),
        ('{"text": {"a": 1}}', "`text` is"),
    ],
)
def test_a_row_that_came_through_cleaning_names_its_line(
    tmp_path: Path, line: str, named: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": " "}\n\n' + line + "\n")
    kept, report = clean(load_rows(str(path)), CleanConfig())
    assert (report.kept, report.empty) == (2, 1)
    with pytest.raises(DataError, match=rf"a\.jsonl, line 4: .*{named}"):
        to_supervised(kept[1])


def test_a_record_keeps_where_its_row_stands(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    [row] = load_rows(str(tmp_path / "a.jsonl"))
    assert to_preference(row).where == f"{tmp_path / 'a.jsonl'}, line 2"
    assert to_preference(row) == to_preference(dict(row))
