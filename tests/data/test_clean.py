"""Cleaning harms nothing that is as it should be, and measures what is said."""

from typing import Any

import pytest

from gearshift.data import CleanConfig, clean

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "    if x:\n        y()\n    z()"},
        {"text": "\u4f60\u597d\uff0c\u4e16\u754c\uff01 \u201ccurly\u201d"},
        {"text": "\U0001f469\u200d\U0001f467 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"},
        {"text": "a", "source": "", "note": None},
        {"messages": [{**CHAT[0], "name": None}, CHAT[1]]},
        {"text": 3},
    ],
    ids=["indented code", "full width", "joiners", "empty column", "null in a message", "type"],
)
def test_what_is_no_fault_stays(row: dict[str, Any]) -> None:
    assert clean([row], CleanConfig())[0] == [row]


def test_the_ends_go_and_the_inside_stays() -> None:
    rows = [{"text": "  one \n"}, {"text": " \n\n\tx\r\n\r\n  y\u200b \n"}]
    assert clean(rows, CleanConfig())[0] == [{"text": "one"}, {"text": "\tx\n\n  y"}]


def test_lengths_are_of_the_words_alone() -> None:
    row = {"messages": CHAT, "source": "far more than a few characters"}
    assert clean([row], CleanConfig(min_chars=4, max_chars=4))[1].kept == 1
    assert clean([row], CleanConfig(min_chars=5))[1].length == 1
    assert clean([row], CleanConfig(max_chars=3))[1].length == 1
