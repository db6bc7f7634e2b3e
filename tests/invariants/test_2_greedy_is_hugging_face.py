"""Invariant 2: greedy tokens equal Hugging Face `generate`'s."""

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from gearshift.engine import Engine, EngineConfig
from gearshift.models.load import ModelConfig, load_policy, load_tokenizer
from gearshift.models.tiny import tiny_tokenizer
from gearshift.types import SamplingParams
from tests.device import device
from tests.zoo import FAMILIES, PATHS, PROMPTS, random_model, take_path

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=24)


def hugging_face(model: PreTrainedModel, prompt: list[int], new: int, end: int) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, path: str) -> None:
    engine = Engine(random_model(family), tiny_tokenizer(), EngineConfig(max_num_seqs=3))
    take_path(engine, path)
    with engine.generating():
        ours = [group[0].token_ids for group in engine.generate(PROMPTS, GREEDY)]
    theirs = random_model(family, attention="eager")
    assert ours == [hugging_face(theirs, prompt, 24, end=2) for prompt in PROMPTS]


def test_the_embedded_model() -> None:
    config = ModelConfig(dtype="float32", device=str(device()))
    tokenizer = load_tokenizer(config)
    texts = ["The capital of France is", "Once upon a time", "1, 2, 3,", "def add(a, b):"]
    prompts = [tokenizer.encode(text) for text in texts]
    engine = Engine(load_policy(config), tokenizer)
    with engine.generating():
        ours = [group[0].token_ids for group in engine.generate(prompts, GREEDY)]
    theirs = load_policy(config)
    theirs.set_attn_implementation("sdpa")
    assert ours == [hugging_face(theirs, p, 24, tokenizer.eos_token_id) for p in prompts]


def test_two_hundred_prompts() -> None:
    """Prompts of all lengths run together in one call; some have the same beginning."""
    rng = random.Random(4)
    beginnings = [[rng.randrange(3, 250) for _ in range(20)] for _ in range(4)]
    prompts = [
        [*rng.choice([[], *beginnings]), *(rng.randrange(3, 250) for _ in range(n))]
        for n in [rng.randrange(1, 40) for _ in range(200)]
    ]
    engine = Engine(random_model("llama"), tiny_tokenizer())
    with engine.generating():
        ours = [g[0].token_ids for g in engine.generate(prompts, replace(GREEDY, max_new_tokens=8))]
    theirs = random_model("llama", attention="eager")
    assert ours == [hugging_face(theirs, prompt, 8, end=2) for prompt in prompts]
