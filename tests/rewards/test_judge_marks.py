"""A judge's mark is what its JSON says; what is not clearly a mark is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.rewards.judge_marks import parse_mark

J = '{"score": %s}'


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        # What judges write.
        ('{"score": 7}', 7), ('{"score": "7.5"}', 7.5), ("{'score': -1}", -1), ('{"Score": 3}', 3),
        ("**Score:** 8/10", 8), ("Score: 8 out of 10.", 8), ("Score = 8.", 8), ("score: .5", 0.5),
        ("7", 7), (" 7/10. ", 7), ("1e1", 10), ('```json\n{"score": 4}\n```', 4),
        ('```{"score": 4}```', 4), ('**{"score": 4}**', 4), ('json\n{"score": 4}', 4),
        # Every digit counts.
        ('{"score": 1e-1}', 0.1), ('{"score": 1.5E+0}', 1.5), ("Score: 1e-1", 0.1),
        ('{"score": -2.5}', -2.5), ('{"score": "8/10"}', 8), ('{"score": 7/10}', 7),
        ("{'score': 2e0}", 2), ('{"score": 0}', 0), ('{"score": -0.0}', 0),
        # JSON before words, an object on its own lines before one in a sentence, else the last.
        ('{"score": 3}\nA perfect answer would have score: 9.', 3),
        ('Score: 9 was my first thought.\n{"score": 3}', 3),
        ('{"score": 2}\nThe answer claims {"score": 10} for itself.', 2),
        ('The answer says:\n> {"score": 10}\n{"score": 2}', 2),
        ('It says {"score": 10}, so {"score": 2}', 2), ('{"score": 1}\n{"score": 2}', 2),
        ("Style score: 3\nScore: 5", 5),
        ('{"reason": "score: 9", "score": 3}', 3), ('{"score": 3, "reason": "score: 9}"}', 3),
        ('{\n  "reason": "it {cut}",\n  "score": 3\n}', 3), ('A set {1, 2}. {"score": 6}', 6),
        ('{"answer": {"x": 1}} is right. Score: 8', 8),
        ('{"score": 5, "parts": [{"score": 1}, {"score": 9}]}', 5),
        ('{"score": 5, "reason": "the "best" one"}', 5),
        # Thoughts.
        ('<think>"score": 9</think>{"score": 3}', 3), ('<think>{"score": 9}</think>\nScore: 3', 3),
        ('a thought {"score": 9}\n</think>\n\n{"score": 3}', 3), ('<think>{"score": 9}', None),
        # No mark.
        ("seven", None), ("I counted 3 faults.", None), ("", None), ("Score: N/A", None),
        ('{"score": null}', None), ('{"score": true}', None), ('{"score": [7]}', None),
        ('{"score": {"score": 7}}', None), ('{"score": "good"}', None), ('{"score": ""}', None),
        ('{"score": NaN}', None), ('{"score": Infinity}', None), ('{"score": -Infinity}', None),
        ('{"score": 1' + "0" * 400 + "}", None), ('{"score": 1e999}', None), ("1e999", None),
        ('{"score": 1' + "0" * 5000 + "}", None), ('{"score": 8', None), ('{"score": 8.', None),
        ('{"score": 1, "score": 9}', None), ("Score: 3-4", None), ("Score: 7 to 9", None),
        ("Score: 7 or 9", None),
        ("Score: 80%", None), ("Score: 8,5", None), ("Score: 1e", None), ("score: 1.2.3", None),
        ('{"score": null} Score: 8', None), ('{"result": {"score": 8}}', None),
        ('{"score": 3, "old": {"score": 9}, oops', None), ("underscore: 3", None),
        ("{" * 5000, None), ('{"a":' * 5000, None),
    ],
)  # fmt: skip
def test_a_mark_is_read_from_what_judges_write(text: str, mark: float | None) -> None:
    assert parse_mark(text) == mark


def test_a_fraction_is_of_the_scale_that_was_asked_for() -> None:
    for text in ("7/10", "Score: 7/10", '{"score": "7/10"}', '{"score": 7/10}'):
        assert parse_mark(text, 10) == 7
        assert parse_mark(text, 100) is None and parse_mark(text, 1) is None
    assert parse_mark("4/5", 5.0) == 4 and parse_mark("0.5/1.0", 1) == 0.5


@given(st.floats(-1e6, 1e6), st.text(alphabet='{}"score:= 19.\n/', max_size=30))
def test_json_alone_is_read_to_the_bit(mark: float, after: str) -> None:
    assert parse_mark(J % repr(mark)) == mark
    assert parse_mark(f"{J % repr(mark)}\nWhy: {after.replace('{', '')}") == mark


@given(st.text(alphabet="{}[]\"'score:= 1e9.-+/\n", max_size=60))
def test_nothing_that_a_judge_says_is_an_error(text: str) -> None:
    parse_mark(text, 10)


def test_an_endless_reply_has_no_mark() -> None:
    assert parse_mark('{"score": 5}' + "{}" * (1 << 14)) is None
