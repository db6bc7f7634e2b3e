"""Pieces of an answer join to the answer, whatever the tokenizer does around a token."""

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gearshift.data.text import decode, stream_text
from gearshift.models.tiny import tiny_tokenizer

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
    return fast(
        model,
        decoders.ByteLevel(),
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


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
    told = list(stream_text(tokenizer, ids))
    assert "".join(told) == decode(tokenizer, ids, skip_special_tokens=True)
    assert "" not in told
    return told


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_answer(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    known = sorted(set(tokenizer.get_vocab().values()))
    token = st.integers(0, max(known) + 5)  # rows that only pad the embedding are sampled too
    if kind == "bytes, cleaned":
        token = st.one_of(token, st.sampled_from(tokenizer.encode(" 'nvretms.?!,é")))
    joins(tokenizer, data.draw(st.lists(token, max_size=24)))


@given(st.text(alphabet=" 'nvretmsx.?!,", max_size=30))
@example("a ' .")
@example("a ' n't")
@example("a ' ' ' ,")
@settings(max_examples=500, deadline=None)
def test_what_clean_up_takes_back_was_not_told(text: str) -> None:
    tokenizer = KINDS["bytes, cleaned"]
    joins(tokenizer, tokenizer.encode(text))


def test_a_text_comes_while_it_is_written() -> None:
    """What can settle is not held back to the end."""
    tokenizer = KINDS["bytes, cleaned"]
    told = joins(tokenizer, tokenizer.encode("Whole words come as they are, é and 家 too."))
    assert len(told) > 25 and max(map(len, told)) <= 4


def test_tokens_that_the_tokenizer_does_not_know_have_no_text() -> None:
    python = ByT5Tokenizer()
    assert decode(python, [100, 1000, 2**21, 101]) == python.decode([100, 101])
    assert decode(tiny_tokenizer(), [3, 5000, 4]) == '!"'
