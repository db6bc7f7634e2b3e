"""Pieces of an answer join to the answer, and a stop string is found at its last token, whatever
the tokenizer does around a token.
"""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gearshift.data.text import decode, has_stop, stream_text
from gearshift.models.tiny import tiny_tokenizer
from tests.oracles.stop_strings import first_stop

CLEANED = ["a", "n", "'", "n't", "'m", "'s", "'ve", "'re", *".?!,tvr", "do", "not", "word"]


def fast(model: models.Model, decoder: decoders.Decoder, **options: object) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


def word_pieces(cleanup: bool) -> PreTrainedTokenizerBase:
    words = ["[UNK]", *dict.fromkeys([*CLEANED, "##s", "##n't", "##ing", "##."])]
    model = models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    return fast(model, decoders.WordPiece(cleanup=cleanup), clean_up_tokenization_spaces=True)


def sentence_pieces(byte_fallback: bool, clean: bool) -> PreTrainedTokenizerBase:
    """As Llama 2's: a space is `▁`, the first is dropped, unknown characters are spelt in bytes."""
    spelt = [f"<0x{b:02X}>" for b in (0x41, 0x20, 0xE5, 0xAE, 0xB6, 0xC3, 0xA9, 0xF0, 0x9F)]
    words = ["<unk>", *spelt, "▁", "▁a", "▁'", "n", "'", "▁.", ".", "▁do", "▁n't", "家", "t"]
    model = models.Unigram([(w, -1.0) for w in words], unk_id=0, byte_fallback=byte_fallback)
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if byte_fallback:
        steps.insert(1, decoders.ByteFallback())
    return fast(model, decoders.Sequence(steps), clean_up_tokenization_spaces=clean)


def metaspace() -> PreTrainedTokenizerBase:
    words = ["<unk>", "▁", "▁a", "b", "▁,", ",", "é"]
    model = models.Unigram([(w, -1.0) for w in words], unk_id=0)
    return fast(model, decoders.Metaspace(), clean_up_tokenization_spaces=True)


def bytes_with_clean_up() -> PreTrainedTokenizerBase:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[])
    tokenizer = fast(
        model,
        decoders.ByteLevel(),
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


KINDS = {
    "bytes": tiny_tokenizer(),
    "bytes, cleaned": bytes_with_clean_up(),
    "word pieces": word_pieces(False),
    "word pieces, cleaned twice": word_pieces(True),
    "sentence pieces": sentence_pieces(False, False),
    "byte fallback": sentence_pieces(True, False),
    "byte fallback, cleaned": sentence_pieces(True, True),
    "metaspace": metaspace(),
    "a tokenizer in Python": ByT5Tokenizer(),
}


def joins(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    pieces = list(stream_text(tokenizer, ids))
    assert "".join(pieces) == decode(tokenizer, ids, skip_special_tokens=True)
    assert "" not in pieces
    return pieces


def sampled(kind: str, size: int) -> st.SearchStrategy[list[int]]:
    """Up to `size` tokens, and now and then a row that only pads the embedding."""
    tokenizer = KINDS[kind]
    known = sorted(set(tokenizer.get_vocab().values()))
    token = st.integers(0, max(known) + 5)
    if kind == "bytes, cleaned":
        token = st.one_of(token, st.sampled_from(tokenizer.encode(" 'nvretms.?!,é")))
    return st.lists(token, max_size=size)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_answer(kind: str, data: st.DataObject) -> None:
    joins(KINDS[kind], data.draw(sampled(kind, 24)))


def ends_at(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[str], first: int = 0
) -> int | None:
    counts = range(1, len(ids) + 1)
    return next((n for n in counts if has_stop(tokenizer, ids[:n], stops, first)), None)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_completion_ends_at_its_first_stop_string(kind: str, data: st.DataObject) -> None:
    """The strings are parts of a text that was there in between, so that each length occurs."""
    tokenizer = KINDS[kind]
    ids = [
        *data.draw(sampled(kind, 12)) * data.draw(st.integers(1, 6)),
        *data.draw(sampled(kind, 40)),
    ]
    text = decode(tokenizer, ids[: data.draw(st.integers(0, len(ids)))])
    begin = data.draw(st.integers(0, len(text)))
    part = text[begin : begin + data.draw(st.integers(1, 40))]
    stops = [stop for stop in (part, data.draw(st.text(" '.a家é\ufffd", max_size=3))) if stop]
    if stops:
        assert ends_at(tokenizer, ids, stops) == first_stop(tokenizer, ids, stops)
        first = data.draw(st.integers(1, 50))
        assert ends_at(tokenizer, ids, stops, first) == first_stop(tokenizer, ids, stops, first)


@pytest.mark.parametrize("name", ["bytes", "byte fallback", "byte fallback, cleaned"])
def test_a_stop_string_is_found_in_the_middle_of_a_run_of_bytes(name: str) -> None:
    """Sentence pieces decode all bytes in a row together, or none of them."""
    tokenizer = KINDS[name]
    spelt = [0xE5, 0xAE, 0xB6]
    if name != "bytes":
        run = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in spelt])
    else:
        run = tokenizer.encode("家")
    for bad in ([], run[:1]):
        ids = [*tokenizer.encode("a" * 30), *bad, *run * 20]
        for stop in ("家", "家" * 15, "a家", "\ufffd家", "a\ufffd"):
            assert ends_at(tokenizer, ids, [stop]) == first_stop(tokenizer, ids, [stop])


def test_a_stop_string_after_quotes_that_clean_up_joins_in_pairs() -> None:
    tokenizer = KINDS["bytes, cleaned"]
    for quotes in range(30, 40):
        ids = tokenizer.encode("a" + " '" * quotes + "x")
        ends = [ends_at(tokenizer, ids, [stop]) for stop in (" 'x", "''x")]
        assert ends == [first_stop(tokenizer, ids, [stop]) for stop in (" 'x", "''x")]
        assert ends.count(None) == 1


def test_a_stop_string_that_reaches_over_tokens_without_a_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w" * 60])
    ids = [*tokenizer.encode("a" * 30), *[5000] * 60, *tokenizer.encode("w" * 60)]
    assert len(ids) == 91 and ends_at(tokenizer, ids, ["aaaw"]) == 91


def test_a_long_stop_string_is_looked_for_as_far_as_it_reaches() -> None:
    tokenizer, text = KINDS["bytes"], "".join(map(str, range(100)))
    ids = tokenizer.encode(text)
    for stop in (text[100:150], text[:170]):
        assert ends_at(tokenizer, ids, [stop, "none"]) == text.index(stop) + len(stop)


def test_only_the_end_of_a_long_completion_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    whole, sizes = tokenizer.decode, []

    def decode_and_count(ids: Sequence[int], **options: bool) -> str:
        sizes.append(len(ids))
        return str(whole(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", decode_and_count)
    assert not has_stop(tokenizer, tokenizer.encode("word " * 1000), ["stop", "\n\n"])
    assert max(sizes) < 50


@given(st.text(alphabet=" 'nvretmsx.?!,", max_size=30))
@example("a ' .")
@example("a ' n't")
@example("a ' ' ' ,")
@settings(max_examples=500, deadline=None)
def test_what_clean_up_takes_back_was_not_sent(text: str) -> None:
    tokenizer = KINDS["bytes, cleaned"]
    joins(tokenizer, tokenizer.encode(text))


def test_a_text_comes_while_it_is_written() -> None:
    """What can settle is not held back to the end."""
    tokenizer = KINDS["bytes, cleaned"]
    pieces = joins(tokenizer, tokenizer.encode("Whole words come as they are, é and 家 too."))
    assert len(pieces) > 25 and max(map(len, pieces)) <= 4


def test_tokens_that_the_tokenizer_does_not_know_have_no_text() -> None:
    python = ByT5Tokenizer()
    assert decode(python, [100, 1000, 2**21, 101]) == python.decode([100, 101])
    assert decode(tiny_tokenizer(), [3, 5000, 4]) == '!"'
    assert joins(ByT5Tokenizer(clean_up_tokenization_spaces=True), [100, 2**21, 101]) == ["a", "b"]
