"""Cleaning harms nothing that is as it should be, and measures what is said."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    rows = [{"text": "\ufeff  one \n"}, {"text": " \r\n\r\n\tx\r\n\r\n  y\u200b \r\n"}]
    assert clean(rows, CleanConfig())[0] == [{"text": "  one"}, {"text": "\tx\n\n  y\u200b"}]
    kept = "  \n\tone  \r\n"
    assert clean([{"text": kept}], CleanConfig(strip=False))[0] == [{"text": kept}]


RIGHT = {
    "entities": "Write &amp; in the source.",
    "code about entities": "assert unescape('&amp;') == '&' and escape('<') == '&lt;'",
    "entities beside accents": "Écrire &amp; ici, &eacute; là.",
    "numeric entities": "&#39; &#x27; &nbsp; &eacute; &euro;",
    "one indented line": "    return x",
    "a tab": "\treturn x",
    "escapes": "\x1b[31mred\x1b[0m",
    "ligatures": "\ufb01nd the \ufb02ow, \u0133s and \u01c6",
    "Khmer": "\u1781\u17d2\u1789\u17bb\u17c6\u200b\u179f\u17d2\u179a\u17a1\u17b6\u1789\u17cb",
    "Thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u200b\u0e04\u0e23\u0e31\u0e1a",
    "word joiner": "10\u2060km",
    "soft hyphen": "Donau\u00addampf",
    "joiners": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0915\u094d\u200d\u0937",
    "other line ends": "a\u2028b\u2029c\x0bd\x0ce\x85f\rg",
    "CR LF in a line": 'send "GET / HTTP/1.1\r\n"\nand wait',
    "a hard break": "one  \ntwo",
    "decomposed": "re\u0301sume\u0301 \u1112\u1161\u11ab",
    "compatibility": "\u2460 \u00bd \u2122 \uff21\uff22 \u212b x\u00b2",
    "curly": "\u201cI\u2019m\u201d \u2014 \u2026",
    "byte order mark inside": "the mark \ufeff stands first",
    "controls": "a\x00b\x08c\x7f",
    "no-break space": "10\u00a0000 \u202f%",
    "French": "L\u2019\u0152uvre \u00e0 la carte, d\u00e9j\u00e0 vu \u00ab ici \u00bb",
    "Portuguese": "M\u00c3E, IRM\u00c3, N\u00c3O \u00c9",
    "Vietnamese": "H\u00c0 N\u1ed8I \u0111\u1eb9p",
    "currencies": "\u00a35\u2013\u00a310, \u00a5\u00a0100, 20 \u20ac",
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_text_stays_to_the_letter(name: str) -> None:
    text = RIGHT[name]
    rows: list[dict[str, Any]] = [
        {"text": text},
        {"prompt": text, "completion": text},
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": text}]},
        {"instruction": text, "input": text, "output": text},
        {"prompt": text, "completions": [text, text], "labels": [True, False]},
    ]
    kept, report = clean(rows, CleanConfig())
    assert kept == rows and report.changed == 0


LETTERS = {
    "ASCII": (0x21, 0x7E),
    "Greek": (0x391, 0x3C9),
    "Cyrillic": (0x410, 0x44F),
    "Hebrew": (0x5D0, 0x5EA),
    "Arabic": (0x620, 0x64A),
    "Devanagari": (0x904, 0x94D),
    "Thai": (0xE01, 0xE3A),
    "Khmer": (0x1780, 0x17D3),
    "Hangul jamo": (0x1100, 0x11FF),
    "Han": (0x4E00, 0x9FFF),
    "kana": (0x3041, 0x30FE),
}


@given(st.data())
def test_text_of_any_script_stays(data: st.DataObject) -> None:
    first, last = LETTERS[data.draw(st.sampled_from(sorted(LETTERS)))]
    letters = [chr(i) for i in range(first, last + 1) if unicodedata.name(chr(i), "")]
    between = [" ", "  ", "\t", "\n", "  \n    ", "\u200b", "\u200c", "\u200d", "\u00ad"]
    inner = st.one_of(st.sampled_from(letters), st.sampled_from(between))
    ends = st.sampled_from(letters)
    body = "".join(data.draw(st.lists(inner, max_size=40)))
    indent = data.draw(st.sampled_from(["", " ", "    ", "\t"]))
    text = indent + data.draw(ends) + body + data.draw(ends)
    assert clean([{"text": text}], CleanConfig())[0] == [{"text": text}]


WORDS = ("caf\u00e9", "na\u00efve", "\u00fcber", "\u2019s", "\u201chi\u201d", "\u20ac5", "\u2026")


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_mojibake_is_mended(words: list[str]) -> None:
    right = " ".join(words)
    broken = right.encode().decode("cp1252", "replace")
    if "\ufffd" not in broken:
        assert clean([{"text": broken}], CleanConfig())[0] == [{"text": right}]
        kept, _ = clean([{"text": broken}], CleanConfig(fix_text=False))
        assert kept == [{"text": broken}]


def test_only_what_is_read_and_learned_is_touched() -> None:
    broken = "  \u00c3\u00a9\r\n"
    call = {"function": {"name": broken, "arguments": broken}}
    row = {
        "prompt": [{"role": "user", "content": broken, "name": broken}],
        "completion": broken,
        "answer": broken,
        "tests": [broken, {"text": broken}],
        "id": broken,
        "messages": [
            {"role": "assistant", "content": broken, "tool_calls": [call]},
            {"role": "tool", "content": broken, "tool_call_id": broken},
        ],
        "conversations": [{"from": "observation", "value": broken}],
        "tools": [{"description": broken}],
    }
    repaired = "  \u00e9"
    [kept], report = clean([row], CleanConfig())
    assert report.changed == 1
    assert kept["prompt"] == [{"role": "user", "content": repaired, "name": broken}]
    assert kept["completion"] == repaired
    assert kept["messages"][0] == {**row["messages"][0], "content": repaired}
    for key in ("answer", "tests", "id", "conversations", "tools"):
        assert kept[key] == row[key]
    assert kept["messages"][1] == row["messages"][1]


def test_a_text_that_shows_nothing_is_empty() -> None:
    for text in ("\u200b", "\ufeff \u00a0\n", "\x00"):
        assert clean([{"text": text}], CleanConfig())[1].empty == 1


def test_half_a_character_becomes_the_sign_for_one() -> None:
    for config in (CleanConfig(), CleanConfig(fix_text=False, strip=False)):
        assert clean([{"text": "a\ud83d b"}], config)[0] == [{"text": "a\ufffd b"}]


def test_lengths_are_of_the_words_alone() -> None:
    row = {"messages": CHAT, "source": "far more than a few characters"}
    assert clean([row], CleanConfig(min_chars=4, max_chars=4))[1].kept == 1
    assert clean([row], CleanConfig(min_chars=5))[1].length == 1
    assert clean([row], CleanConfig(max_chars=3))[1].length == 1
