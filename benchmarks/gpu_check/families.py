"""Random models of the families that the package describes, in one small size."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
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

from benchmarks.gpu_check.models import model_of
from benchmarks.gpu_check.probe import Probe
from gearshift.models.attention import ATTENTION

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {"initializer_range": 0.2}
_LONGEST = 256
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "phi3", "gpt2", "opt",
    "gpt_neox",
)  # fmt: skip


def config_of(probe: Probe, family: str) -> Any:
    """A config of two layers, 256 wide on a card."""
    hidden = probe.size(256, 32)
    size = hidden // 4
    sizes = {
        "vocab_size": 320, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": _LONGEST,
        **_TOKENS, **_WIDE,
    }  # fmt: skip
    grouped = {**sizes, "num_key_value_heads": 2}
    gemma = {**grouped, "head_dim": size, "sliding_window": 8, "query_pre_attn_scalar": size}
    made: dict[str, Any] = {
        "llama": lambda: LlamaConfig(**grouped, tie_word_embeddings=True),
        "mistral": lambda: MistralConfig(**grouped, sliding_window=8),
        "qwen2": lambda: Qwen2Config(**grouped),
        "qwen3": lambda: Qwen3Config(**grouped, head_dim=size),
        "gemma2": lambda: Gemma2Config(**gemma),
        "gemma3": lambda: Gemma3TextConfig(**gemma),
        "smollm3": lambda: SmolLM3Config(**grouped, no_rope_layer_interval=2),
        "phi3": lambda: Phi3Config(**grouped),
        "gpt2": lambda: GPT2Config(
            vocab_size=320,
            n_embd=hidden,
            n_layer=2,
            n_head=4,
            n_positions=_LONGEST,
            bos_token_id=1,
            eos_token_id=2,
            **_WIDE,
        ),
        "opt": lambda: OPTConfig(
            vocab_size=320,
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_LONGEST,
            init_std=0.2,
            dropout=0.0,
            **_TOKENS,
        ),
        "gpt_neox": lambda: GPTNeoXConfig(**sizes),
    }
    return made[family]()


def family_model(
    probe: Probe, family: str, dtype: torch.dtype, attention: str = ATTENTION
) -> PreTrainedModel:
    """The same weights at each call; biases and norms are random, too."""
    model = model_of(probe, config_of(probe, family), dtype, attention)
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model
