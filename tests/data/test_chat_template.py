"""Masks, ends and turns hold for every kind of template, with tokens that merge across borders."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gearshift.data.chat import (
    end_token_ids,
    render_completion,
    render_prompt,
    render_supervised,
    render_text,
    render_turn,
)
from gearshift.errors import DataError
from gearshift.types import Message
from tests.data.conftest import FAMILIES, Family
from tests.oracles.chat_masks import answer_mask

# Words with what merges and breaks: blank lines, indentation, several bytes a character, nothing.
WORDS = st.one_of(
    st.sampled_from(
        ["", " ", "\n", "\n\nhello", "    return x\n", "the\n\n\n", "\u2028", "日本 👩‍👩‍👧"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>[]"), max_size=12),
)
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)
many = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def conversation(turns: list[tuple[str, str]]) -> list[Message]:
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


@given(TURNS)
@example([("hello", "\n\nhello"), ("\n\n", "\n\n")])
@example([("", ""), ("", "")])
@many
def test_the_mask_is_every_token_with_a_character_of_an_answer(
    family: Family, turns: list[tuple[str, str]]
) -> None:
    tokenizer, messages = family.tokenizer, conversation(turns)
    ids, mask = render_supervised(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    of_text = answer_mask(text, family.opening, family.end)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert mask == [int(any(of_text[a:b])) for a, b in encoded["offset_mapping"]]


@given(WORDS, WORDS)
@example("hello", "\n\nhello")
@example("hello", "    return x")
@many
def test_an_answer_continues_its_prompts_own_tokens(family: Family, user: str, words: str) -> None:
    tokenizer = family.tokenizer
    prompt = conversation([(user, words)])[:1]
    before, answer = render_completion(tokenizer, prompt, words)
    assert before == render_prompt(tokenizer, prompt)
    assert answer[-1] in end_token_ids(tokenizer)
    whole = tokenizer.apply_chat_template(conversation([(user, words)]), tokenize=False)
    written = tokenizer.decode([*before, *answer])
    # What is left out is what the template writes after the end token.
    assert whole.startswith(written) and whole[len(written) :].strip() in ("", "<|endoftext|>")


@given(WORDS)
@many
def test_the_next_turn_goes_on_from_the_end_token(family: Family, words: str) -> None:
    tokenizer = family.tokenizer
    following = render_turn(tokenizer, [{"role": "user", "content": words}])
    whole = tokenizer.apply_chat_template(
        [*conversation([("hi", "yo")]), {"role": "user", "content": words}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert whole.endswith(
        "yo" + (" " if "INST" in whole else "") + family.end + tokenizer.decode(following)
    )


def test_what_ends_a_turn() -> None:
    ends = {
        name: set(f.tokenizer.convert_ids_to_tokens(end_token_ids(f.tokenizer)))
        for name, f in FAMILIES.items()
    }
    assert ends == {
        "smollm": {"<|im_end|>"},
        "llama": {"</s>"},
        "phi": {"<|end|>", "<|endoftext|>"},
        "qwen": {"<|im_end|>"},
    }


def test_bos_comes_once() -> None:
    llama = FAMILIES["llama"].tokenizer
    chat = conversation([("hi", "yo")])
    bos, eos = llama.bos_token_id, llama.eos_token_id
    assert render_supervised(llama, chat)[0].count(bos) == 1
    for text in ("hello", "<s>hello"):
        ids, mask = render_text(llama, text)
        assert ids.count(bos) == 1 and (ids[0], ids[-1]) == (bos, eos)
        assert mask == [0] + [1] * (len(ids) - 1)


def test_a_conversation_that_the_template_refuses_is_told_in_one_sentence() -> None:
    llama = FAMILIES["llama"].tokenizer
    with pytest.raises(DataError, match=r"refuses this conversation: system is not known\.$"):
        render_prompt(llama, [{"role": "system", "content": "hi"}])
