"""Pieces of a text add up to it, never break a character, and end before a stop string."""

from hypothesis import given
from hypothesis import strategies as st

from gearshift.data.text import decode
from gearshift.serve.token_text import TextStream, TokenNames
from tests.serve.fake import TOKENIZER

WHOLE = TokenNames(TOKENIZER).changes_text


@given(st.lists(st.integers(0, 258), max_size=60))
def test_pieces_add_up(ids: list[int]) -> None:
    stream = TextStream(TOKENIZER, (), WHOLE)
    pieces = [stream.add(token) for token in ids]
    whole = decode(TOKENIZER, ids, skip_special_tokens=True)
    assert "".join([*pieces, stream.end()]) == whole


@given(
    st.text(alphabet="abcö", max_size=30),
    st.lists(st.text("abcö", min_size=1), max_size=3),
    st.integers(0, 9),
)
def test_a_text_ends_before_a_stop_string(text: str, stops: list[str], first: int) -> None:
    first = min(first, len(text))
    stream = TextStream(TOKENIZER, tuple(stops), WHOLE, len(TOKENIZER.encode(text[:first])))
    said, wanted = "", text
    for end in range(first, len(text) + 1):  # the string that is complete first ends the text
        if places := [at for stop in stops if (at := text[:end].find(stop, first)) >= 0]:
            wanted = text[: min(places)]
            break
    for token in TOKENIZER.encode(text):
        said += stream.add(token)
        assert wanted.startswith(said)
    assert said + stream.end() == wanted


def test_no_half_character_is_sent() -> None:
    stream = TextStream(TOKENIZER, (), WHOLE)
    assert [stream.add(t) for t in TOKENIZER.encode("a語b")] == ["a", "", "", "語", "b"]


def test_tokens_have_names_that_differ() -> None:
    names = TokenNames(TOKENIZER)
    assert len({names.text(token) for token in range(len(TOKENIZER))}) == len(TOKENIZER)
    half = TOKENIZER.encode("語")[0]
    assert names.text(half) == "\\xe8" and names.bytes(half) == b"\xe8"
    assert names.bytes(10**6) == b"" and names.text(0) == "<|endoftext|>"
