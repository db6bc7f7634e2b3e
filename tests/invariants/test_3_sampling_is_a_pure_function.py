"""Invariant 3: completions and their log-probs do not depend on batch composition, cache size or
prefix sharing. On a CPU they are equal to the bit; on a GPU, which promises none, tokens in fp32.
"""

import pytest
import torch
from transformers import PreTrainedModel

from gearshift.engine import Engine, EngineConfig
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import ON_CPU, bits
from tests.models import families
from tests.zoo import PROMPTS, assert_same, random_model, written

PARAMS = SamplingParams(n=3, max_new_tokens=20)
LENGTHS = (1, 2, 3, 15, 16, 17, 40)
MANY = [*PROMPTS, *([(7 * i * n) % 200 + 20 for i in range(n)] for n in LENGTHS)]


def with_adapter(family: str) -> PreTrainedModel:
    model = random_model(family)
    add_adapter(model, AdapterConfig(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += 0.3 * noise.to(parameter.device)
    return model


def by_its_own_modules(kind: str) -> PreTrainedModel:
    return families.random_model(families.small_config(kind))


MODELS = {
    "llama": lambda: random_model("llama"),
    "llama, bf16": lambda: random_model("llama").bfloat16(),
    "llama, an adapter": lambda: with_adapter("llama"),
    "llama, bf16, an adapter": lambda: with_adapter("llama").bfloat16(),
    "gemma2": lambda: random_model("gemma2"),
    "gpt2": lambda: random_model("gpt2"),
    "gpt_neox": lambda: random_model("gpt_neox"),
    "cohere, by its own modules": lambda: by_its_own_modules("cohere"),
    "mixtral, by its own modules": lambda: by_its_own_modules("mixtral"),
    "gemma4_text, by its own modules": lambda: by_its_own_modules("gemma4_text"),
}


SLOW = [pytest.param(n, marks=pytest.mark.slow if "modules" in n else ()) for n in MODELS]


@pytest.mark.parametrize("name", SLOW)
def test_what_is_computed_together_does_not_matter(name: str) -> None:
    """All at once; each alone; few rows, a small cache and preemption."""
    model = MODELS[name]()
    if not bits(model.dtype) and (ON_CPU or model.dtype != torch.float32):
        pytest.skip("the promise is of compiled kernels, which this machine lacks")
    params = SamplingParams(n=2, max_new_tokens=24)
    engine = Engine(model, tiny_tokenizer(), EngineConfig(max_num_seqs=64), seed=5)
    ids = range(len(MANY))
    with engine.generating():
        together = written(engine.generate(MANY, params, ids))
        engine.weights_changed()  # the caches are empty again
        alone = [written(engine.generate([MANY[i]], params, [i]))[0] for i in ids]
    small = EngineConfig(max_num_seqs=12, max_num_batched_tokens=16, kv_cache_tokens=80)
    other = Engine(model, tiny_tokenizer(), small, seed=5)
    with other.generating():
        cramped = written(other.generate(MANY, params, ids))
    assert other.take_stats().preemptions
    assert_same(together, alone)
    assert_same(together, cramped)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama, bf16"])
def test_threads_do_not_matter(name: str) -> None:
    if not ON_CPU:
        pytest.skip("threads are of the CPU's kernels")
    groups = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        engine = Engine(MODELS[name](), tiny_tokenizer(), seed=5)
        with engine.generating():
            groups.append(written(engine.generate(MANY, SamplingParams(n=2, max_new_tokens=6))))
    assert groups[0] == groups[1]


def test_its_own_modules_too() -> None:
    engine = Engine(by_its_own_modules("mixtral"), tiny_tokenizer(), seed=5)
    params = SamplingParams(n=2, max_new_tokens=4)
    with engine.generating():
        together = written(engine.generate(MANY[:6], params))
        alone = [written(engine.generate([p], params, [i]))[0] for i, p in enumerate(MANY[:6])]
    assert_same(together, alone)


def test_truncated_and_penalised_sampling_too() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer(), seed=5)
    params = SamplingParams(n=2, max_new_tokens=12, top_p=0.9, top_k=40, repetition_penalty=1.2)
    with engine.generating():
        together = written(engine.generate(MANY, params))
        alone = [written(engine.generate([p], params, [i]))[0] for i, p in enumerate(MANY)]
    assert_same(together, alone)


def test_greedy_too() -> None:
    engine = Engine(random_model("qwen2"), tiny_tokenizer())
    params = SamplingParams(temperature=0.0, max_new_tokens=12)
    with engine.generating():
        together = written(engine.generate(MANY, params))
        alone = [written(engine.generate([p], params))[0] for p in MANY]
    assert_same(together, alone)


def test_streaming_writes_the_same() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer(), seed=5)
    with engine.generating():
        [[whole, *_]] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[9])
        assert list(engine.stream(PROMPTS[0], PARAMS, request_id=9)) == whole.token_ids


def test_seed_request_and_sample_all_matter() -> None:
    engine = Engine(random_model("llama"), tiny_tokenizer(), seed=5)
    with engine.generating():
        [group] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[1])
        [other] = engine.generate(PROMPTS[:1], PARAMS, request_ids=[2])
        [reseeded] = engine.generate(
            PROMPTS[:1], SamplingParams(n=3, max_new_tokens=20, seed=6), [1]
        )
    texts = [tuple(c.token_ids) for c in (*group, *other, *reseeded)]
    assert len(set(texts)) == len(texts)
