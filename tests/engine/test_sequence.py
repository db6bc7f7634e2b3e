"""A request is checked before it runs beside others; what goes wrong in one ends that one."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.engine import decoder as decoding
from gearshift.errors import ConfigError, DataError, GearshiftError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import random_model, tiny_model

PROMPT = [5, 6, 7]
# For several requests at a time; a GPU looks after each step, as a CPU does.
CONFIG = EngineConfig(max_length=64, kv_cache_tokens=2048, decode_steps_per_sync=1)


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model(), tiny_tokenizer(), CONFIG)


WRONG = [
    {"stop": ("",)}, {"stop": ""}, {"stop": 5}, {"stop": (b"a",)}, {"stop": ("a", None)},
    {"stop_token_ids": 5}, {"stop_token_ids": (1.0,)}, {"stop_token_ids": (True,)},
    {"stop_token_ids": (-1,)}, {"stop_token_ids": "12"},
    {"logit_bias": ((-1, 1.0),)}, {"logit_bias": ((1, math.nan),)}, {"logit_bias": 3},
    {"logit_bias": ((1, -math.inf),)}, {"logit_bias": ((1, 1e30),)}, {"logit_bias": (1, 2)},
    {"logit_bias": ((1, 1.0), (1, 2.0))}, {"logit_bias": {"1": 2.0}}, {"logit_bias": ((1,),)},
    {"bad_words": ((),)}, {"bad_words": ("ab",)}, {"bad_words": ((1.5,),)}, {"bad_words": (4,)},
    {"bad_words": ((-3,),)},
    *({name: bad} for name in ("temperature", "top_p", "min_p", "repetition_penalty")
      for bad in (math.nan, math.inf, -1, "1", None, True, 10**400, 1j)),
    *({name: bad} for name in ("frequency_penalty", "presence_penalty")
      for bad in (math.nan, -2.1, 2.1, "1", None, True)),
    *({"top_logprobs": bad} for bad in (-1, 1.0, "1", True)),
    {"temperature": 1e-30}, {"temperature": 1e30}, {"repetition_penalty": 1e-30},
    {"repetition_penalty": 0}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 1},
    {"min_new_tokens": 129}, {"min_new_tokens": 2, "max_new_tokens": 1},
    *({name: bad} for name in ("n", "top_k", "max_new_tokens", "min_new_tokens")
      for bad in (1.5, 2.0, "8", True, None, -1, math.nan)),
    {"n": 0}, {"n": 10**9}, {"max_new_tokens": 0},
    {"seed": -1}, {"seed": 2**63}, {"seed": 1.0}, {"seed": "1"}, {"seed": True},
]  # fmt: skip


@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_wrong_parameters_are_refused_when_they_are_made(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"sampling {next(iter(keys))} is .*; it must") as caught:
        SamplingParams(**keys)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"stop": "yz"}, {"stop": ("yz",)}),
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None, "stop_token_ids": None, "logit_bias": None, "bad_words": None}, {}),
        ({"stop_token_ids": np.array([4, 5])}, {"stop_token_ids": (4, 5)}),
        ({"logit_bias": {4: 1, 5: -2.0}}, {"logit_bias": ((4, 1.0), (5, -2.0))}),
        ({"bad_words": [[1, 2], [3]]}, {"bad_words": ((1, 2), (3,))}),
        ({"n": np.int64(3), "temperature": 1, "top_p": np.float32(0.5)}, {"n": 3, "top_p": 0.5}),
        ({"min_p": Fraction(1, 4)}, {"min_p": 0.25}),
    ],
    ids=str,
)
def test_what_is_meant_is_taken(given: dict[str, Any], same: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    assert params == SamplingParams(**same) and hash(params) == hash(SamplingParams(**same))
    for name in ("n", "temperature", "top_p", "min_p"):
        assert type(getattr(params, name)) in (int, float)


def test_a_stop_that_is_one_string_is_no_set_of_letters(engine: Engine) -> None:
    def written(**keys: Any) -> list[int]:
        with engine.generating():
            [[completion]] = engine.generate([PROMPT], SamplingParams(max_new_tokens=40, **keys))
        return completion.token_ids

    alone = written()
    text = engine.tokenizer.decode(alone)
    letters = text[4] + "\x00"  # its first letter is written, it is not
    assert len(text) > 20 and written(stop=letters) == alone
    assert engine.tokenizer.decode(written(stop=text[5:8])).endswith(text[5:8])


def test_no_completion_ends_before_its_least_tokens(engine: Engine) -> None:
    """By an end token, by a further one, and by a string that its text had before."""
    end, letter = engine.tokenizer.eos_token_id, engine.tokenizer.encode("a")[0]
    asked: list[dict[str, Any]] = [
        {"logit_bias": {end: 50.0}},
        {"logit_bias": {end: 50.0}, "temperature": 0.0, "n": 1},
        {"logit_bias": {letter: 50.0}, "stop_token_ids": (letter,)},
        {"logit_bias": {letter: 50.0}, "stop": ("aa",)},
    ]
    for keys in asked:
        params = SamplingParams(**{"n": 3, "max_new_tokens": 20, **keys})
        with engine.generating():
            [soon] = engine.generate([PROMPT], params)
            [late] = engine.generate([PROMPT], replace(params, min_new_tokens=6))
            streams = [engine.stream(PROMPT, replace(params, min_new_tokens=6)) for _ in range(2)]
            tokens = [list(stream) for stream in streams]
        assert all(len(c.token_ids) <= 2 for c in soon)
        least = 8 if "stop" in keys else 7
        assert all(len(c.token_ids) == least and c.finish_reason == "stop" for c in late)
        assert tokens == [late[0].token_ids] * 2
        # What trains is the policy's own log-prob; what was drawn had no end token.
        for c in late if "stop" not in keys else []:
            assert all(d > p for d, p in zip(c.drawn_logprobs[:6], c.logprobs[:6], strict=True))
    with engine.generating(), pytest.raises(ConfigError, match="min_new_tokens forbids the end"):
        every = tuple(range(259))
        engine.generate([PROMPT], SamplingParams(min_new_tokens=1, stop_token_ids=every))


@pytest.mark.parametrize(
    "keys",
    [
        {"stop_token_ids": (259,)}, {"logit_bias": ((259, 1.0),)}, {"bad_words": ((3, 10**6),)},
        {"bad_words": tuple((i,) for i in range(259))},
    ],
)  # fmt: skip
def test_tokens_beyond_the_vocabulary_end_no_other_stream(
    engine: Engine, keys: dict[str, Any]
) -> None:
    with engine.generating():
        alone = engine.generate([PROMPT], SamplingParams(max_new_tokens=9))[0][0].token_ids
        other = engine.stream(PROMPT, SamplingParams(max_new_tokens=9))
        begun = [next(other)]
        with pytest.raises(ConfigError, match=next(iter(keys))):
            engine.stream(PROMPT, SamplingParams(max_new_tokens=2, **keys))
        assert begun + list(other) == alone
        [[most]] = engine.generate([PROMPT], SamplingParams(max_new_tokens=2, top_k=10**6))
    assert len(most.token_ids) == 2  # top_k beyond the vocabulary keeps all


@pytest.mark.parametrize(
    "prompt",
    [
        *([5, 259], [-1], [5, 2.0], [True], ["5"], [2**70], torch.tensor([1.5])),
        *("text", 5, None, torch.tensor(5)),
    ],
)
def test_a_prompt_is_tokens_of_the_vocabulary(engine: Engine, prompt: Any) -> None:
    with engine.generating(), pytest.raises(DataError, match="Prompt 1 "):
        engine.generate([PROMPT, prompt], SamplingParams(max_new_tokens=2))


def test_a_prompt_may_be_a_tensor(engine: Engine) -> None:
    with engine.generating():
        params = SamplingParams(max_new_tokens=4)
        assert engine.generate([torch.tensor(PROMPT)], params) == engine.generate([PROMPT], params)


@pytest.mark.parametrize("ids", [[-1], [2**63], [1.0], [], [1, 2]])
def test_request_ids_are_one_number_each(engine: Engine, ids: list[Any]) -> None:
    with engine.generating(), pytest.raises(ConfigError, match="request id"):
        engine.generate([PROMPT], SamplingParams(max_new_tokens=2), ids)


def test_a_seed_is_a_number_that_samples_can_come_from() -> None:
    with pytest.raises(ConfigError, match="seed"):
        Engine(tiny_model(), tiny_tokenizer(), seed=2**70)


# What goes wrong while others run


def others_go_on(engine: Engine, said: str, **bad: Any) -> None:
    params = SamplingParams(max_new_tokens=9, bad_words=((2,),))  # which would end it
    wrong = SamplingParams(max_new_tokens=9, **bad)
    with engine.generating():
        alone = engine.generate([PROMPT], params)[0][0].token_ids
        assert len(alone) == 9
        other = engine.stream(PROMPT, params)
        begun = [next(other)]
        with pytest.raises(GearshiftError, match=said):
            list(engine.stream([9, 9], wrong, request_id=7))
        assert begun + list(other) == alone
        late = engine.stream(PROMPT, params)
        with pytest.raises(GearshiftError, match=said):
            engine.generate([[9, 9]], wrong, [7])
        assert list(late) == alone


def test_a_text_that_cannot_be_decoded_ends_its_own_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(ids: list[int], **_: Any) -> str:
        raise RuntimeError("no text")

    monkeypatch.setattr(engine.tokenizer, "decode", decode)
    others_go_on(engine, "Request 7 failed alone: RuntimeError: no text", stop="x")


def test_a_row_that_cannot_be_adjusted_ends_its_own_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = decoding.sample

    def failing(draw: Any, logits: Any, uniforms: Any, params: Any, history: Any) -> Any:
        if any(p.logit_bias for p in params):
            raise IndexError("out of range")
        return sample(draw, logits, uniforms, params, history)

    monkeypatch.setattr(decoding, "sample", failing)
    others_go_on(engine, "failed alone: IndexError", logit_bias={3: 1.0})


def test_logits_that_are_no_numbers_end_their_own_request() -> None:
    engine = Engine(random_model("qwen2"), tiny_tokenizer(), CONFIG)
    with torch.no_grad():  # the head is another matrix: only prompts with this token are ill
        engine.model.get_input_embeddings().weight[9] = math.nan
    engine.weights_changed()
    others_go_on(engine, "logits are not finite", top_logprobs=3)


EXTREMES: list[dict[str, Any]] = [
    {"logit_bias": {4: 1e9}}, {"logit_bias": {4: -1e9}}, {"temperature": 1e-5}, {"min_p": 1e-300},
    {"temperature": 1e5}, {"repetition_penalty": 1e3, "temperature": 1e-5}, {"top_p": 1e-300},
    {"repetition_penalty": 1e-3, "temperature": 1e-5, "logit_bias": {4: 1e9}},
    {"top_p": 1e-300, "top_k": 2, "min_p": 0.5}, {"top_logprobs": 10**9},
    {"frequency_penalty": 2, "presence_penalty": 2, "temperature": 1e-5},
]  # fmt: skip


@pytest.mark.parametrize("keys", EXTREMES, ids=str)
def test_the_most_that_is_allowed_leaves_numbers(engine: Engine, keys: dict[str, Any]) -> None:
    with engine.generating():
        [[c]] = engine.generate([PROMPT], SamplingParams(max_new_tokens=3, **keys))
    assert all(map(math.isfinite, [*c.logprobs, *c.drawn_logprobs]))
