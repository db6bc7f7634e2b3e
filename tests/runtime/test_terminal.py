"""What a terminal is never sent."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from gearshift.runtime.terminal import counted, one_line, printable

TEXTS = st.text(st.characters())  # surrogates and control characters too


@given(TEXTS)
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    assert not any(unicodedata.bidirectional(c) in BIDI for c in shown)
    shown.encode()


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@given(TEXTS, st.integers(0, 50))
def test_a_stream_may_be_cut_anywhere(text: str, at: int) -> None:
    assert printable(text[:at]) + printable(text[at:]) == printable(text)


@given(TEXTS, st.integers(3, 50))
def test_the_length_is_bounded(text: str, most: int) -> None:
    assert len(printable(text, most)) <= most
    assert len(one_line(text, most)) <= most
    assert not set("\n\r\t") & set(one_line(text, most))


def test_what_is_shown() -> None:
    assert printable("a\x1b[31mb\tc\n\r\x9b\u202e\ud800") == (
        "a\\x1b[31mb\tc\n\\r\\x9b\\u202e\\ud800"
    )
    assert (
        printable("Grüße, 你好 🙂 👨\u200d👩 שלום\u200f") == "Grüße, 你好 🙂 👨\u200d👩 שלום\u200f"
    )
    assert printable("abcdefgh", 6) == "abc..." and printable("abcdef", 6) == "abcdef"
    assert one_line(" a\n\n  b\x00 ") == "a b\\x00"


def test_a_number_stands_before_its_noun() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
