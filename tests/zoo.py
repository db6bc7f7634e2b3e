"""Small random models of many families, and the batches that tests make of what they wrote, on the
device of the tests.
"""

import copy
from collections.abc import Iterable, Sequence

import pytest
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
from gearshift.models.tiny import tiny_model as tiny_on_cpu
from gearshift.types import Completion
from tests.device import ON_CPU, device

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
    return model.eval().to(device())


def tiny_model() -> PreTrainedModel:
    """The model of this name."""
    return tiny_on_cpu().to(device())


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
    ).to(device())


def sampled_logprobs(groups: Sequence[Sequence[Completion]]) -> torch.Tensor:
    """[M], in the order of `pack_completions`."""
    return torch.tensor([x for group in groups for c in group for x in c.logprobs], device=device())


Written = list[list[tuple[list[int], list[float], str | None]]]


def written(groups: Iterable[Iterable[Completion]]) -> Written:
    """Tokens, log-probs, and what ended them."""
    return [
        [(c.token_ids, c.logprobs + c.drawn_logprobs, c.finish_reason) for c in group]
        for group in groups
    ]


def assert_same(ours: Written, theirs: Written) -> None:
    """They are equal: on a CPU to the bit; on a GPU, which is asked in fp32, each token, and the
    log-probs to rounding.
    """
    if ON_CPU:
        assert ours == theirs
        return
    for group, other in zip(ours, theirs, strict=True):
        for (tokens, logprobs, end), (their_tokens, their_logprobs, their_end) in zip(
            group, other, strict=True
        ):
            assert (tokens, end) == (their_tokens, their_end)
            assert logprobs == pytest.approx(their_logprobs, abs=1e-4)


def hf_scores(classifier: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Each sequence's score by Hugging Face's own modules, on padded rows."""
    return ModelRunner(classifier, undescribed=EXACT).score_all(rows)
