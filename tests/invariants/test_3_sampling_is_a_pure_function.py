"""Invariant 3: completions do not depend on batch composition, cache size or prefix sharing."""

import pytest

from gearshift.engine import EngineConfig, HybridEngine
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.zoo import PROMPTS, random_model

PARAMS = SamplingParams(n=3, max_new_tokens=20)


@pytest.fixture(scope="module")
def engine() -> HybridEngine:
    return HybridEngine(random_model("llama"), tiny_tokenizer(), EngineConfig(max_rows=64), seed=5)


def test_rows_and_prefill_size_do_not_matter(engine: HybridEngine) -> None:
    small = EngineConfig(max_rows=2, prefill_tokens=1)
    other = HybridEngine(random_model("llama"), tiny_tokenizer(), small, seed=5)
    with engine.generating(), other.generating():
        a, b = engine.generate(PROMPTS, PARAMS), other.generate(PROMPTS, PARAMS)
    assert [[c.token_ids for c in g] for g in a] == [[c.token_ids for c in g] for g in b]


def test_a_request_alone_writes_what_it_writes_among_others(engine: HybridEngine) -> None:
    with engine.generating():
        together = engine.generate(PROMPTS, PARAMS, request_ids=[40, 41, 42, 43])
        alone = [
            engine.generate([p], PARAMS, request_ids=[40 + i])[0] for i, p in enumerate(PROMPTS)
        ]
    assert [[c.token_ids for c in g] for g in together] == [[c.token_ids for c in g] for g in alone]


def test_streaming_writes_the_same(engine: HybridEngine) -> None:
    with engine.generating():
        [[whole, *_]] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[9])
        assert list(engine.stream(PROMPTS[0], PARAMS, request_id=9)) == whole.token_ids


def test_seed_request_and_sample_all_matter(engine: HybridEngine) -> None:
    with engine.generating():
        [group] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[1])
        [other] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[2])
        [reseeded] = engine.generate(
            PROMPTS[:1], SamplingParams(n=3, max_new_tokens=20, seed=6), [1]
        )
    texts = [tuple(c.token_ids) for c in (*group, *other, *reseeded)]
    assert len(set(texts)) == len(texts)
