"""Chat templates: exact masks, one BOS, the end token trained, and answers that go on from sampled
tokens.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from gearshift.batch import pack
from gearshift.data.chat import (
    end_token_ids,
    render_completion,
    render_prompt,
    render_supervised,
    render_text,
    render_turn,
)
from gearshift.errors import DataError
from gearshift.models.load import ModelConfig, load_tokenizer
from gearshift.models.tiny import tiny_tokenizer
from tests.oracles.chat_masks import chatml_mask

WORDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), min_size=1, max_size=20
)
CHATS = st.builds(
    lambda system, turns: (
        ([{"role": "system", "content": system}] if system else [])
        + [
            {"role": role, "content": words}
            for user, assistant in turns
            for role, words in (("user", user), ("assistant", assistant))
        ]
    ),
    st.none() | WORDS,
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3),
)
TOKENIZER = tiny_tokenizer()


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@given(CHATS)
@settings(max_examples=60, deadline=None)
def test_mask_is_the_oracles(messages: list[dict[str, str]]) -> None:
    ids, mask = render_supervised(TOKENIZER, messages)
    assert ids == TOKENIZER.apply_chat_template(messages, return_dict=False)
    text = TOKENIZER.apply_chat_template(messages, tokenize=False)
    of_text = chatml_mask(text)
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == ids
    # One token a byte: a character of several bytes is several tokens at the same place.
    assert mask == [int(of_text[start]) for start, _ in encoded["offset_mapping"]]


def test_the_embedded_models_template() -> None:
    tokenizer = load_tokenizer(ModelConfig())
    messages = [
        {"role": "user", "content": "turn on the light"},
        {"role": "assistant", "content": '{"intent": "HassTurnOn"}'},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "any time"},
    ]
    ids, mask = render_supervised(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, return_dict=False)
    trained = [token for token, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained) == '{"intent": "HassTurnOn"}<|im_end|>any time<|im_end|>'


def test_pad_equal_to_eos_is_trained_as_the_end() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, mask = render_supervised(TOKENIZER, chat)
    assert ids[max(i for i, m in enumerate(mask) if m)] == TOKENIZER.eos_token_id
    assert mask[-1] == 0  # the template's newline after the end


def test_a_bos_that_comes_twice_is_refused() -> None:
    chat = [{"role": "user", "content": "a"}]
    once = with_template("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert render_prompt(once, chat).count(once.bos_token_id) == 1
    twice = with_template("{{ bos_token }}{{ bos_token }}{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="BOS token twice"):
        render_prompt(twice, chat)


def test_no_template_and_a_refusing_template_are_told() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render_prompt(bare, [{"role": "user", "content": "a"}])
    strict = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        render_prompt(strict, [{"role": "user", "content": "a"}])


REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}{{ '!' if loop.last else '.' }}]"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant!]{% endif %}"
)


def test_a_template_that_rewrites_uses_its_own_marks_or_is_refused() -> None:
    chat = [
        {"role": role, "content": words}
        for role, words in (
            ("user", "hi"),
            ("assistant", "yo"),
            ("user", "so"),
            ("assistant", "ok"),
        )
    ]
    tokenizer = with_template(REWRITING)
    ids, mask = render_supervised(tokenizer, chat)
    trained = [token for token, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(trained) == "yo<|im_end|>ok<|im_end|>"
    unmarked = REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match="generation"):
        render_supervised(with_template(unmarked), chat)


def test_plain_text_ends_and_is_all_trained_but_what_nothing_predicts() -> None:
    ids, mask = render_text(TOKENIZER, "hello")
    assert TOKENIZER.decode(ids) == "hello<|im_end|>" and mask == [0, 1, 1, 1, 1, 1]
    assert pack([(ids, mask)]).logit_indices.tolist() == [0, 1, 2, 3, 4]


@given(WORDS, WORDS, WORDS)
@settings(max_examples=40, deadline=None)
def test_prompt_answer_and_next_turn_make_the_conversation(
    first: str, answer: str, then: str
) -> None:
    prompt = [{"role": "user", "content": first}]
    prompt_ids, answer_ids = render_completion(TOKENIZER, prompt, answer)
    assert answer_ids[-1] in end_token_ids(TOKENIZER)
    following = {"role": "user", "content": then}
    whole = [*prompt, {"role": "assistant", "content": answer}, following]
    assert [*prompt_ids, *answer_ids, *render_turn(TOKENIZER, [following])] == render_prompt(
        TOKENIZER, whole
    )
