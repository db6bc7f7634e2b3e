"""A small random model of every type that `AutoModelForCausalLM` knows, and whether the engine runs
it rightly or refuses it: `python -m tests.models.families` writes docs/models.md.

Hugging Face's own forward of each sequence alone decides what is right, not the engine.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as hf_logging

from gearshift.batch import pack_groups
from gearshift.engine import Engine
from gearshift.errors import ModelError
from gearshift.models.load import ModelConfig, load_policy
from gearshift.models.tiny import tiny_tokenizer
from gearshift.pipeline.activations import Activations
from gearshift.pipeline.memory import Shape
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.trainers.needs import MemoryNeeds, Tree
from gearshift.types import SamplingParams
from tests.device import device

VOCABULARY = 300
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HOW = ("described", "Hugging Face's modules")

NOT_RUN = {
    "whisper": "speech",
    "musicgen": "music",
    "musicgen_melody": "music",
    "moshi": "speech",
    "git": "captions of images",
    "trocr": "the decoder of an image reader",
    "moss_transcribe_diarize": "speech",
    "got_ocr2": "images",
    "fuyu": "images",
    "gemma4_assistant": "a drafter",
    "gemma4_unified_assistant": "a drafter",
    "gemma3n": "its vision part needs timm; its text part is `gemma3n_text`",
}
"""Types that are no language models by themselves."""

UNSAVED = ("emu3", "mllama")
"""What is saved of these is a text part of a type that `AutoModelForCausalLM` does not load."""

_SMALL = {
    # sizes
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "emb_dim": 64,
    "intermediate_size": 96,
    "dff": 96,
    "ffn_dim": 96,
    "dim_ff": 96,
    "d_inner": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "feed_forward_size": 96,
    # layers
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_encoder_layers": 1,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "dim_head": 16,
    "attention_head_size": 16,
    "kv_channels": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    # lengths
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "context_length": 128,
    "original_max_position_embeddings": 128,
    "sliding_window": 8,
    "window_size": 8,
    "local_attention": 8,
    "sliding_window_size": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "rel_extent": 16,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "zero_expert_num": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "router_hidden_size": 32,
    # latent attention and indexers: the values' size is not the queries'
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "o_lora_rank": 16,
    "o_groups": 2,
    # states
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "chunk_size": 8,
    "n_groups": 1,
    "lru_width": 64,
    # per-layer parts of Gemma
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    # tokens
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 1,
    "eod_token_id": 2,
    "unpadded_vocab_size": VOCABULARY,
    # others
    "tie_word_embeddings": False,
    "is_decoder": True,
    "use_mamba_kernels": False,
    "classifier_dropout": 0.0,
}
"""What a config gets, where it has such a field."""

_KINDS = {"num_hidden_layers": 4}
_WINDOWS = {**_KINDS, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
_STATES = {
    **_KINDS,
    "layer_types": ["linear_attention"] * 2 + ["full_attention", "linear_attention"],
}
_CONVOLUTIONS = {**_KINDS, "layer_types": ["conv", "full_attention"] * 2}
_LATENT = {"num_key_value_heads": 4}
_LATENT_8 = {**_LATENT, "head_dim": 8}
_SEEING = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_PARTS = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 96, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
    "hidden_size_global": 64,
}  # fmt: skip
_SHARED = {
    "num_hidden_layers": 5, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}  # fmt: skip
_QWEN_4 = {
    **_KINDS, "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_budget": 8,
    "ngram_vocab_size_base": 50, "split_ngram_parts": 2, "hc_lowrank": 8,
}  # fmt: skip
_OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT_8,
    "bailing_hybrid": {**_STATES, **_LATENT},
    "bamba": {**_KINDS, "attn_layer_indices": [2]},
    "beam": _WINDOWS,
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        **{f"{part}_config": _PARTS for part in ("patcher", "encoder", "decoder", "global")},
    },
    "cohere2": _WINDOWS,
    "cohere2_moe": _WINDOWS,
    "cohere_compass_text": {
        **_WINDOWS,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT_8,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT_8,
    "deepseek_v4": _KINDS,
    "dots3_note": {
        "vision_config": {
            **_SEEING,
            "adapter_in_dim": 32,
            "adapter_out_dim": 64,
            "mlp_layer_types": ["dense"],
        },
        "audio_config": {"adapter_out_dim": 64},
    },
    "dots3_note_text": _LATENT_8,
    "exaone4": _WINDOWS,
    "exaone_moe": _WINDOWS,
    "gemma2": _WINDOWS,
    "gemma3": {"vision_config": _SEEING},
    "gemma3_text": _WINDOWS,
    "gemma3n_text": _SHARED,
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_text": _SHARED,
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "gemma4_unified_text": _SHARED,
    "glm4_moe_lite": {**_LATENT, "v_head_dim": 24},
    "glm_moe_dsa": _LATENT_8,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _STATES,
    "hy_v4": _LATENT,
    "inkling_text": {**_KINDS, "logits_mup_width_multiplier": 1.0},
    "inkling2_text": _KINDS,
    "jamba": {**_KINDS, "attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {**_STATES, **_LATENT},
    "kolibri1": _WINDOWS,
    "laguna": _WINDOWS,
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "lfm3": _CONVOLUTIONS,
    "llama4": {"vision_config": _SEEING},
    "llama4_text": _KINDS,
    "longcat_flash": _LATENT_8,
    "mamba2": {"num_heads": 8},
    "minicpm3": _LATENT,
    "minimax": _STATES,
    "ministral": _WINDOWS,
    "mllama": {
        "vision_config": {
            **_SEEING,
            "attention_heads": 2,
            "num_global_layers": 1,
            "max_num_tiles": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        "text_config": {"cross_attention_layers": []},
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "olmo3": _WINDOWS,
    "olmo_hybrid": _STATES,
    "phi4_multimodal": {
        "vision_config": {**_SEEING, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen2_moe": {"use_sliding_window": False},
    "qwen3_5": {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32}},
    "qwen3_5_moe": {"vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32}},
    "qwen3_5_moe_text": _STATES,
    "qwen3_5_text": _STATES,
    "qwen3_next": _STATES,
    "qwen4_exp_text": _QWEN_4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
    },
    "rembert": {"input_embedding_size": 64, "output_embedding_size": 80},
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "smollm3": {**_KINDS, "no_rope_layer_interval": 2},
    "vaultgemma": _WINDOWS,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        **_KINDS,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        **_KINDS,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "chunk_size": 8,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a type needs besides."""


def fields_of(config_class: Any) -> set[str]:
    """The names that this config takes."""
    if dataclasses.is_dataclass(config_class):
        return {field.name for field in dataclasses.fields(config_class)}
    return set(inspect.signature(config_class.__init__).parameters)


def small_config(kind: str, **more: Any) -> Any:
    """A small config of this type."""
    config_class = CONFIG_MAPPING[kind]
    names = fields_of(config_class)
    given = {name: value for name, value in _SMALL.items() if name in names}
    given |= _OVERRIDES.get(kind, {}) | more
    if "text_config" in config_class.sub_configs:
        text = config_class.sub_configs["text_config"]
        given["text_config"] = {
            **{n: v for n, v in _SMALL.items() if n in fields_of(text)},
            **_OVERRIDES.get(text.model_type, {}),
            **given.get("text_config", {}),
        }
    return config_class(**given)


def random_model(config: Any, seed: int = 3) -> PreTrainedModel:
    """Random weights whose logits spread by about 2; norms, biases and sinks are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager"
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
            else:
                parameter.data.normal_(std=0.15)
    return model.eval().to(device())


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, gelu": ("llama", {"hidden_act": "gelu"}),
    "llama, rotary by parts (llama3)": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
    ),
    "llama, dynamic NTK": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "phi3, part of each head rotary": (
        "phi3", {"rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        }},
    ),
    "phi3, longrope": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 8,
        "short_factor": [1.0] * 8, "original_max_position_embeddings": 32,
    }}),
    "qwen2, window": ("qwen2", {
        "use_sliding_window": True, "max_window_layers": 1,
    }),
    "qwen3, window": ("qwen3", {
        "use_sliding_window": True, "max_window_layers": 1,
    }),
    "qwen2_moe, window": ("qwen2_moe", {
        "use_sliding_window": True, "max_window_layers": 1,
    }),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phimoe, no window": ("phimoe", {"sliding_window": None}),
    "llama4_text, chunk of the whole length": ("llama4_text", {"attention_chunk_size": 128}),
    "granite, multipliers": ("granite", {
        "embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    }),
    "granitemoehybrid, attention alone": ("granitemoehybrid", {
        "layer_types": ["full_attention"] * 4,
    }),
    "nemotron_h, attention alone": ("nemotron_h", {
        "layers_block_type": ["full_attention", "moe", "full_attention", "mlp"],
    }),
    "deepseek_v3, values as long as queries": ("deepseek_v3", {"v_head_dim": 24}),
    "minimax_m3_vl_text, sparse layers": ("minimax_m3_vl_text", {
        "layer_types": ["minimax_m3_sparse"] * 2, "index_block_size": 4, "index_topk_blocks": 2,
    }),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt, norms after": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False}),
    "gemma4_text, experts": ("gemma4_text", {
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 32,
    }),
    "gemma4_text, values are keys": ("gemma4_text", {"attention_k_eq_v": True}),
    "gemma4_text, no embeddings by layer": ("gemma4_text", {
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    }),
    "gemma3_text, linear rotary": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }}),
    "gemma2, both directions": ("gemma2", {"use_bidirectional_attention": True}),
    "mixtral, window": ("mixtral", {"sliding_window": 8}),
    "starcoder2, window": ("starcoder2", {"sliding_window": 8}),
    "qwen3_moe, a dense layer": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "ernie4_5_moe, every other layer": ("ernie4_5_moe", {"moe_layer_interval": 2}),
    "ministral3, scale by position": ("ministral3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 8,
    }}),
    "phi3, longrope, below its length": ("phi3", {
        "original_max_position_embeddings": 128, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [4.0] * 8,
            "short_factor": [1.0] * 8, "original_max_position_embeddings": 128,
        },
    }),
    "cohere, query and key norms": ("cohere", {"use_qk_norm": True}),
    "glm4_moe, query and key norms": ("glm4_moe", {"use_qk_norm": True}),
    "exaone_moe, groups of experts": ("exaone_moe", {"n_group": 2, "topk_group": 1}),
    "stablelm, query and key norms": ("stablelm", {"qk_layernorm": True}),
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True}),
}  # fmt: skip
"""Options that a family has besides, as (type, what its config gets)."""


class Verdict(NamedTuple):
    """What became of one model."""

    right: bool
    how: str
    """One of `HOW`, or why it is refused."""


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every type that is run, and the options, by name."""
    kinds = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_RUN))
    return {**{kind: (kind, {}) for kind in kinds}, **OPTIONS}


def judge(kind: str, options: dict[str, Any], folder: Path) -> Verdict:
    """Refused by `load_policy` or `Engine`, or right; `AssertionError` if it is wrong."""
    model = random_model(small_config(kind, **options))
    model.save_pretrained(folder)
    try:
        if kind in UNSAVED:
            loaded = copy.deepcopy(model)
        else:
            loaded = load_policy(ModelConfig(dtype="float32", device="cpu"), str(folder))
        engine = Engine(loaded, tiny_tokenizer())
    except ModelError as error:
        return Verdict(False, first_words(str(error)))
    compare(engine, model)
    assert Shape.of(engine.model, torch.float32).cache(1, 1) > 0, "the memory plan"
    needs = MemoryNeeds(OptimizerConfig(), 64, 64, Tree(8, 2, 12))
    fields = (engine.model.config, needs, torch.float32, torch.device("cpu"))
    plan = Activations(*fields, policy=type(engine.model))
    assert plan.bytes(64, False) > 0, plan.unknown
    return Verdict(True, HOW[engine.runner.form != "described"])


def first_words(error: str) -> str:
    """The reason in a refusal."""
    for pattern in (
        r"refused: (.*)\. docs/models",
        r"(right up to .*);",
        r"could not be loaded \((.*)\); give",
    ):
        if found := re.search(pattern, error):
            return found[1]
    return error


def compare(engine: Engine, plain: PreTrainedModel) -> None:
    """Greedy tokens, log-probs packed and prompt-shared, and the gradient of two packed sequences
    are those of Hugging Face's forward of each sequence alone.
    """
    prompts = [[7, 11, 13], [(17 * i) % 290 + 5 for i in range(29)]]
    greedy = SamplingParams(n=2, max_new_tokens=7, temperature=0.0)
    with engine.generating():
        written = [group[0] for group in engine.generate(prompts, greedy)]
    rows = []
    for prompt, one, other in zip(prompts, written, ([40, 41, 42], [200, 100]), strict=True):
        logits_SV = logits_of(plain, prompt, one.token_ids)
        first, second = logits_SV.topk(2).values.T
        same = logits_SV.argmax(-1) == torch.tensor(one.token_ids)
        assert bool((same | (first - second < 1e-3)).all()), "greedy tokens"
        exact = alone(plain, prompt, one.token_ids)
        assert far(torch.tensor(one.logprobs), exact) < 1e-3, "log-probs as written"
        rows.append((prompt, [(ids, [1] * len(ids)) for ids in (one.token_ids, other)]))
    plain.zero_grad()
    exact = torch.cat([alone(plain, prompt, ids) for prompt, many in rows for ids, _ in many])
    exact.sum().backward()
    for share in (False, True):
        engine.model.zero_grad()
        with engine.training():
            scored = engine.logprobs(pack_groups(rows, share=share)).logprobs
        assert far(scored, exact) < 1e-3, f"log-probs packed, share={share}"
        scored.sum().backward()
        assert cosine(engine.model, plain) > 0.9999, f"gradient, share={share}"


def logits_of(plain: PreTrainedModel, prompt: list[int], row: list[int]) -> Tensor:
    """[S, V]: what Hugging Face predicts a completion's tokens from."""
    ids = torch.tensor([prompt + row])
    logits_TV: Tensor = plain(input_ids=ids, use_cache=False).logits[0].float()
    return logits_TV[len(prompt) - 1 : -1]


def alone(plain: PreTrainedModel, prompt: list[int], row: list[int]) -> Tensor:
    """Log-probs of a completion by Hugging Face."""
    log_p_SV = torch.log_softmax(logits_of(plain, prompt, row), -1)
    return log_p_SV.gather(1, torch.tensor(row)[:, None])[:, 0]


def far(ours: Tensor, theirs: Tensor) -> float:
    """The greatest difference in nats."""
    return float((ours - theirs).detach().abs().max())


def cosine(ours: PreTrainedModel, theirs: PreTrainedModel) -> float:
    """Between the gradients of two models of one kind."""
    exact = dict(theirs.named_parameters())
    every = [(p.grad, exact[name].grad) for name, p in ours.named_parameters()]
    pairs = [(a, b) for a, b in every if a is not None and b is not None]
    both = [[g.flatten() for g in side] for side in zip(*pairs, strict=True)]
    return float(torch.cosine_similarity(torch.cat(both[0]), torch.cat(both[1]), dim=0))


def sweep() -> dict[str, Verdict]:
    """All cases."""
    found = {}
    for name, (kind, options) in cases().items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = judge(kind, options, Path(folder))
    return found


def page(found: dict[str, Verdict]) -> str:
    """docs/models.md."""
    kinds = {name: verdict for name, verdict in found.items() if name not in OPTIONS}
    right = {how: [n for n, v in kinds.items() if v == Verdict(True, how)] for how in HOW}
    refused: dict[str, list[str]] = {}
    for name, verdict in kinds.items():
        if not verdict.right:
            refused.setdefault(grouped(verdict.how), []).append(name)
    lines = [
        "# Models",
        "",
        "`model.name` is `embedded`, `tiny`, a folder, or a name on the Hugging Face hub. "
        "`gearshift doctor MODEL` says how it runs:",
        "",
        "- in the **described** form, the fast one: plain functions over the model's weights;",
        "- through **Hugging Face's modules**, more slowly and equally right;",
        "- or not at all: what would be computed wrongly is **refused** in one line that says why.",
        "",
        "Whenever an engine is made, it compares your checkpoint with Hugging Face's own forward. "
        "References and critics are compared too. "
        "`gearshift parity MODEL` prints the differences: of the two gears and of Hugging Face, "
        "for one turn and for two, and of each layer where they are large.",
        "",
        f"This page says what the code of each type can do. `AutoModelForCausalLM` of transformers "
        f"{transformers.__version__} knows {len(kinds) + len(NOT_RUN)} types. For each, a small "
        "random model is loaded and given to the engine. It counts as right if its greedy tokens, "
        "its gradients, and the log-probs of packed and prompt-shared sequences (to 1e-3 nats in "
        "fp32) equal those of Hugging Face's forward of each sequence alone. "
        "`python -m tests.models.families` makes the page, and `tests/models/test_families.py` "
        "checks it.",
        "",
        f"## Right: {sum(map(len, right.values()))}",
        "",
        f"On the fast path (described; {len(right['described'])}): {listed(right['described'])}.",
        "",
        f"Through {HOW[1]} ({len(right[HOW[1]])}): {listed(right[HOW[1]])}.",
        "",
        f"{listed(UNSAVED)} run, but a stage saves only their text part, which "
        "`AutoModelForCausalLM` does not load again.",
        "",
        f"## Refused: {sum(map(len, refused.values()))}",
        "",
        *(f"- {why}: {listed(names)}." for why, names in sorted(refused.items())),
        "",
        "Some models are right up to a length only (a window or a chunk that only Hugging Face's "
        "mask has, longrope's original length). The engine runs them if `engine.max_length` is "
        "within it; else the refusal names the number to set. Dynamic NTK is computed rightly up "
        "to `max_position_embeddings`, the longest length that the engine allows.",
        "",
        "## Options",
        "",
        "| option | outcome |",
        "|---|---|",
        *(f"| {name} | {in_words(found[name])} |" for name in OPTIONS),
        "",
        "## Not tried",
        "",
        *(f"- `{name}`: {why}." for name, why in NOT_RUN.items()),
    ]
    return "\n".join(lines) + "\n"


def listed(names: Iterable[str]) -> str:
    """In code, with commas."""
    return ", ".join(f"`{name}`" for name in names)


def grouped(why: str) -> str:
    """A reason without what is a model's own."""
    if "up to" in why:
        return "a window or a chunk is only in Hugging Face's mask; right below it"
    return re.sub(r" \(.*?\)$", "", why)


def in_words(found: Verdict) -> str:
    """In words."""
    return f"right, {found.how}" if found.right else f"refused: {found.how}"


if __name__ == "__main__":
    hf_logging.set_verbosity_error()
    PAGE.write_text(page(sweep()), encoding="utf-8")
