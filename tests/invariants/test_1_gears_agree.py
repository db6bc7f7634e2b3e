"""Invariant 1: a completion's log-prob from the generation gear equals the training gear's."""

import pytest
import torch

from gearshift.engine import Engine, EngineConfig
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import device
from tests.oracles.scores import lone_logprobs
from tests.zoo import (
    FAMILIES,
    PATHS,
    PROMPTS,
    pack_completions,
    random_model,
    sampled_logprobs,
    take_path,
)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_gap_is_at_most_1e_5(family: str, temperature: float) -> None:
    engine = Engine(random_model(family), tiny_tokenizer(), EngineConfig(max_num_seqs=5))
    params = SamplingParams(n=3, max_new_tokens=24, temperature=temperature)
    with engine.generating():
        groups = engine.generate(PROMPTS, params)
    with engine.training(), torch.no_grad():
        scores = engine.logprobs(pack_completions(PROMPTS, groups), temperature)
    assert (scores.logprobs - sampled_logprobs(groups)).abs().max() <= 1e-5
    alone = random_model(family, attention="eager")
    oracle = [
        lone_logprobs(alone, prompt, c.token_ids, temperature)
        for prompt, group in zip(PROMPTS, groups, strict=True)
        for c in group
    ]
    assert (scores.logprobs - torch.cat([o[0] for o in oracle])).abs().max() <= 1e-5
    assert (scores.entropy - torch.cat([o[1] for o in oracle])).abs().max() <= 1e-4


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_of_the_generation_gear(family: str, path: str) -> None:
    """Some beginnings are shared, some sequences put back."""
    config = EngineConfig(max_num_seqs=6, kv_cache_tokens=8 * 16)
    engine = take_path(Engine(random_model(family), tiny_tokenizer(), config), path)
    prompts = [*PROMPTS, PROMPTS[2] * 2, PROMPTS[2] + [9, 8, 7]]
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(n=3, max_new_tokens=24))
    assert engine.take_stats().shared_tokens > 0
    with engine.training(), torch.no_grad():
        scores = engine.logprobs(pack_completions(prompts, groups))
    assert (scores.logprobs - sampled_logprobs(groups)).abs().max() <= 1e-5


def test_bf16_gap_of_the_embedded_model_is_at_most_a_hundredth_nat() -> None:
    config = ModelConfig(dtype="bfloat16", device=str(device()))
    tokenizer = load_tokenizer(config)
    engine = Engine(load_policy(config), tokenizer)
    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "def add(a, b):")]
    with engine.generating():
        groups = engine.generate(prompts, SamplingParams(n=4, max_new_tokens=24))
    with engine.training(), torch.no_grad():
        scores = engine.logprobs(pack_completions(prompts, groups))
    assert (scores.logprobs - sampled_logprobs(groups)).abs().mean() <= 0.01
