"""Log-probs at temperature 1, of sampled and of given tokens: what asks gets one row's figures, and
what does not ask notices nothing.
"""

import asyncio
from typing import Any

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.errors import CapacityError, ConfigError, DataError, GearshiftError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import Completion, SamplingParams, TokenScore
from tests.oracles.scores import lone_logprobs
from tests.zoo import PROMPTS, random_model

LONG = SamplingParams(max_new_tokens=40, logit_bias={2: -100.0})


def engine(name: str = "llama", **config: object) -> Engine:
    keys = EngineConfig.model_validate({"decode_steps_per_sync": 1, **config})
    return Engine(random_model(name), tiny_tokenizer(), keys, seed=3)


def written(e: Engine, params: Any, prompts: list[list[int]] = PROMPTS) -> list[Completion]:
    with e.generating():
        return [c for group in e.generate(prompts, params) for c in group]


def scored(e: Engine, ids: list[int], top: int = 0) -> list[TokenScore]:
    with e.generating():
        return e.score(ids, top)


KEYS: list[dict[str, Any]] = [
    {}, {"temperature": 0.4}, {"temperature": 0.0}, {"temperature": 1.7, "top_k": 3},
    {"logit_bias": {9: 5.0}, "frequency_penalty": 1.5, "presence_penalty": -1.0},
]  # fmt: skip


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_raw_log_probs_are_the_models_at_temperature_one(name: str, keys: dict[str, Any]) -> None:
    params = SamplingParams(n=2, max_new_tokens=12, top_logprobs=4, **keys)
    alone = random_model(name, attention="eager")
    completions = written(engine(name), params)
    for prompt, c in zip([p for p in PROMPTS for _ in range(2)], completions, strict=True):
        expected, _ = lone_logprobs(alone, prompt, c.token_ids, 1.0)
        assert c.raw_logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert len(c.top_logprobs) == len(c.token_ids)
        for token, raw, top in zip(c.token_ids, c.raw_logprobs, c.top_logprobs, strict=True):
            assert len(top) == 4 and [x for _, x in top] == sorted([x for _, x in top])[::-1]
            assert dict(top).get(token, raw) == raw <= top[0][1]
            if params.temperature == 0:
                assert top[0] == (token, raw)


def test_recorded_steps_give_the_logits_of_their_tokens() -> None:
    params = SamplingParams(n=3, max_new_tokens=20, top_logprobs=1)
    e = Engine(random_model("llama").bfloat16(), tiny_tokenizer(), EngineConfig(), seed=3)
    for c in written(e, params):
        assert c.raw_logprobs == pytest.approx(c.logprobs, abs=1e-5)


@pytest.mark.parametrize("ahead", [1, 7])
def test_what_asks_for_scores_changes_no_sample(ahead: int) -> None:
    """Its own samples and those beside it stay the same, and only it has the figures."""
    small = {"max_num_seqs": 4, "kv_cache_tokens": 96, "decode_steps_per_sync": ahead}
    plain = [SamplingParams(n=2, max_new_tokens=n) for n in (20, 9, 14, 17)]
    asks = [SamplingParams(n=2, max_new_tokens=20, top_logprobs=0), *plain[1:]]
    expected, found = written(engine(**small), plain), written(engine(**small), asks)
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
        assert len(b.raw_logprobs) == (len(b.token_ids) if i < 2 else 0)
        assert b.top_logprobs == [()] * len(b.raw_logprobs)
        assert not a.raw_logprobs and not a.top_logprobs


def test_scores_do_not_depend_on_what_is_computed_together() -> None:
    params = SamplingParams(
        n=3, max_new_tokens=20, top_logprobs=3, frequency_penalty=0.7, presence_penalty=0.2
    )
    together = written(engine(), params)
    cramped = engine(max_num_seqs=2, kv_cache_tokens=64, max_num_batched_tokens=16)
    assert written(cramped, params) == together
    assert cramped.take_stats().preemptions


def test_penalties_do_not_count_the_prompt() -> None:
    """At the first position nothing is written yet, so nothing is penalised."""
    prompt = [list(range(3, 250))]
    first = SamplingParams(n=8, max_new_tokens=1)
    penalized = SamplingParams(n=8, max_new_tokens=1, frequency_penalty=2, presence_penalty=2)
    e = engine()
    for a, b in zip(written(e, first, prompt), written(e, penalized, prompt), strict=True):
        assert a.token_ids == b.token_ids
        assert b.drawn_logprobs == pytest.approx(b.logprobs, abs=1e-5)
    greedy = SamplingParams(
        temperature=0.0, max_new_tokens=30, presence_penalty=2.0, logit_bias={2: -100.0}
    )
    plain = SamplingParams(temperature=0.0, max_new_tokens=30, logit_bias={2: -100.0})
    [varied], [same] = written(e, greedy, PROMPTS[:1]), written(e, plain, PROMPTS[:1])
    assert len(set(varied.token_ids)) >= len(set(same.token_ids))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_given_tokens_have_the_scores_that_sampling_gave_them(name: str) -> None:
    e = engine(name)
    [c] = written(e, SamplingParams(max_new_tokens=20, top_logprobs=3), PROMPTS[:1])
    scores = scored(e, PROMPTS[0] + c.token_ids, 3)
    assert len(scores) == len(PROMPTS[0]) + len(c.token_ids) - 1
    mine = scores[len(PROMPTS[0]) - 1 :]
    assert [s.logprob for s in mine] == pytest.approx(c.raw_logprobs, abs=1e-5)
    assert [[t for t, _ in s.top] for s in mine] == [[t for t, _ in top] for top in c.top_logprobs]
    ids = PROMPTS[0] + c.token_ids
    expected, _ = lone_logprobs(random_model(name, attention="eager"), ids[:1], ids[1:], 1.0)
    assert [s.logprob for s in scores] == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_long_text_is_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [(7 * i) % 200 + 20 for i in range(150)]
    whole = scored(engine(), ids, 2)
    assert scored(engine(max_num_batched_tokens=11), ids, 2) == whole
    e, widths = engine(), []
    monkeypatch.setattr("gearshift.engine.probe._LOGITS_AT_ONCE", 259 * 20)
    scores = "gearshift.engine.probe.token_scores"

    def seen(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> list[TokenScore]:
        widths.append(len(logits))
        return [TokenScore(0.0, ())] * len(logits)

    monkeypatch.setattr(scores, seen)
    assert len(scored(e, ids)) == 149 and max(widths) == 20


def test_scoring_disturbs_no_request() -> None:
    ids, e, other = list(range(20, 90)), engine(), engine()
    [expected] = written(other, LONG, PROMPTS[:1])
    alone = scored(other, ids, 2)

    async def beside() -> list[list[TokenScore]]:
        found = []
        async for _ in stream:
            found.append(e.score(ids, 2))
        return found

    with e.generating():
        stream = e.loop.stream(PROMPTS[0], LONG, 0)
        found = asyncio.run(beside())
    assert stream.completion == expected
    assert found == [alone] * len(expected.token_ids)


@torch.no_grad()
def test_scores_are_of_the_newest_weights() -> None:
    e, ids = engine(), list(range(20, 60))
    before = scored(e, ids)
    with e.generating():
        weight = e.model.get_submodule("model.layers.0.mlp.down_proj").weight
        weight.data = weight.data + 0.3  # elsewhere
        after = e.score(ids)
    oracle = random_model("llama", attention="eager")
    oracle.load_state_dict(e.model.state_dict())
    expected, _ = lone_logprobs(oracle, ids[:1], ids[1:], 1.0)
    assert [s.logprob for s in after] == pytest.approx(expected.tolist(), abs=1e-4)
    assert after != before


def test_what_cannot_be_scored_is_refused() -> None:
    e = engine(max_length=32)
    assert scored(e, [5]) == [] and len(scored(e, [5] * 32)) == 31
    for ids, top, error, words in (
        ([], 0, CapacityError, "The text is empty"),
        ([5] * 33, 0, CapacityError, "passes the limit of 32"),
        ([5, 259], 0, DataError, "no token id"),
        ([5, 6], -1, ConfigError, "top_logprobs"),
    ):
        with pytest.raises(error, match=words):
            scored(e, ids, top)
    with pytest.raises(GearshiftError, match="needs the generation gear"):
        e.score([5, 6])
