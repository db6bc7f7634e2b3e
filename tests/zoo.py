"""Small random models of many families, and the batches that tests make of what they wrote."""

import copy
from collections.abc import Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from gearshift.batch import PackedBatch, pack_groups
from gearshift.engine import Engine
from gearshift.kernels.reference import Kernels
from gearshift.models.attention import ATTENTION
from gearshift.models.runner import EXACT, ModelRunner
from gearshift.types import Completion

VOCABULARY = 259
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

CONFIGS = {
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GROUPED, sliding_window=8),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    "gemma2": Gemma2Config(**_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "gemma3": Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
    "smollm3": SmolLM3Config(**_GROUPED, no_rope_layer_interval=2),
    "phi3": Phi3Config(**_GROUPED),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    ),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        init_std=0.2,
    ),
    "gpt_neox": GPTNeoXConfig(**_COMMON),
}
FAMILIES = sorted(CONFIGS)

PATHS = ["compiled", "tensor functions", "hugging face"]
"""The ways in which the generation gear can run a model."""


def take_path(engine: Engine, path: str) -> Engine:
    """Make a fresh engine run in this way."""
    assert engine.runner.form == "described", "every family of the zoo is described"
    if path != "compiled":
        engine.runner.kernels = Kernels()
    if path == "hugging face":
        engine.runner.plan = engine.runner.weights = None
    return engine


PROMPTS = [[3, 4, 5, 6, 7], [10, 11, 12], [20] * 17, [5, 9, 200, 77]]


def random_model(family: str, attention: str = ATTENTION) -> PreTrainedModel:
    """The same random weights at every call; biases and norms too are random, so that none can be
    forgotten.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(CONFIGS[family]), attn_implementation=attention
        )
    for parameter in model.parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.1 * noise)
    return model.eval()


def pack_completions(
    prompts: Sequence[list[int]], groups: Sequence[Sequence[Completion]], share: bool = True
) -> PackedBatch:
    """What was sampled, ready to be scored."""
    return pack_groups(
        [
            (prompt, [(c.token_ids, [1] * len(c.token_ids)) for c in group])
            for prompt, group in zip(prompts, groups, strict=True)
        ],
        share=share,
    )


def sampled_logprobs(groups: Sequence[Sequence[Completion]]) -> torch.Tensor:
    """[M], in the order of `pack_completions`."""
    return torch.tensor([x for group in groups for c in group for x in c.logprobs])


def hf_scores(classifier: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Each sequence's score by Hugging Face's own modules, on padded rows."""
    return ModelRunner(classifier, undescribed=EXACT).score_all(rows)
