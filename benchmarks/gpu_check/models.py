"""Random models of real shapes, built on the device, and batches for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,  # noqa: F401  imported once, before the forks
    PreTrainedModel,
)

from benchmarks.gpu_check.probe import Probe
from gearshift.batch import PackedBatch, pack, pack_groups
from gearshift.engine import Engine, EngineConfig, stats
from gearshift.models.attention import ATTENTION
from gearshift.models.tiny import tiny_tokenizer

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 49_152, 8_192, True),
    "1B": (2048, 8192, 16, 32, 8, 128_256, 131_072, True),
    "3B": (3072, 8192, 28, 24, 8, 128_256, 131_072, True),
    "8B": (4096, 14_336, 32, 32, 8, 128_256, 131_072, False),
}
"""Llamas by their number of weights; the values are of `_SIZES`."""
_TINY = (48, 96, 2, 6, 2, 320, 512, True)
_SPREAD = 3.5
"""Random logits are flat, which hides differences: a weight on the last norm gives them about the
standard deviation of a trained model's.
"""


def llama(probe: Probe, shape: str, **changes: Any) -> LlamaConfig:
    """The config of this shape; a tiny one on a CPU."""
    sizes = dict(zip(_SIZES, probe.size(SHAPES[shape], _TINY), strict=True))
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    # The layers of a narrow model would add little to the token that they read.
    weights = {"initializer_range": probe.size(0.02, 0.2)}
    return LlamaConfig(**{**sizes, **tokens, **weights, **changes})


def model_of(
    probe: Probe, config: Any, dtype: torch.dtype = torch.bfloat16, attention: str = ATTENTION
) -> PreTrainedModel:
    """A model with weights drawn on the device; the same ones at each call."""
    torch.manual_seed(0)
    with probe.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.to(probe.device)
    if (norm := getattr(model.base_model, "norm", None)) is not None:
        width = config.initializer_range * config.hidden_size**0.5
        norm.weight.data.mul_(_SPREAD / width)
    return model.eval()


def engine_of(
    probe: Probe, shape: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any
) -> Engine:
    """An engine of this shape, whose completions end at their length only."""
    return engine_with(model_of(probe, llama(probe, shape), dtype), seed, **config)


def engine_with(model: PreTrainedModel, seed: int = 0, **config: Any) -> Engine:
    """The same with a model that is there."""
    engine = Engine(model, tiny_tokenizer(), EngineConfig(**config), seed)
    engine.end_tokens = frozenset()
    return engine


def prompts_of(engine: Engine, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of one length."""
    rng = random.Random(seed)
    return [_tokens(rng, engine, length) for _ in range(count)]


def rows_batch(probe: Probe, engine: Engine, rows: int, length: int, seed: int = 0) -> PackedBatch:
    """Supervised rows of one length; the first token of each is given, all others are scored."""
    rng = random.Random(seed)
    ids = [_tokens(rng, engine, length) for _ in range(rows)]
    batch = pack([(row, [0] + [1] * (length - 1)) for row in ids]).to(probe.device)
    return weighted(batch)


def groups_batch(
    probe: Probe, engine: Engine, groups: int, size: int, prompt: int, lengths: tuple[int, int],
    seed: int = 0,
) -> PackedBatch:  # fmt: skip
    """Groups of completions of random length, from `lengths[0]` to `lengths[1]`, each group with
    its prompt.
    """
    rng = random.Random(seed)

    def completion() -> tuple[list[int], list[int]]:
        ids = _tokens(rng, engine, rng.randint(*lengths))
        return ids, [1] * len(ids)

    made = [
        (_tokens(rng, engine, prompt), [completion() for _ in range(size)]) for _ in range(groups)
    ]
    return weighted(pack_groups(made).to(probe.device))


def weighted(batch: PackedBatch) -> PackedBatch:
    """Each scored token with the same weight, so that the loss is their mean."""
    scored = int(batch.loss_mask.sum())
    weights = torch.full((scored,), 1.0 / scored, device=batch.input_ids.device)
    return batch.with_scored(loss_weights=weights)


def _tokens(rng: random.Random, engine: Engine, length: int) -> list[int]:
    return [rng.randrange(3, engine.vocabulary) for _ in range(length)]


def quick_limits(probe: Probe) -> None:
    """On a CPU the limits of the machine take seconds to measure; constants take their place."""
    if not probe.cuda:
        stats._bytes_per_second = lambda device: 1e10
        stats._flops_per_second = lambda device, dtype: 1e11
