"""Where each described family keeps the parts of its layers, as a table. It computes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gearshift.kernels.specs import Norm

GATES: dict[str, tuple[str, ...]] = {
    "silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh",),
}  # fmt: skip
"""Each gate with its names in configs."""


@dataclass(frozen=True)
class Parts:
    """Where a family keeps what a plan needs: paths of attributes, from the trunk, from a layer, or
    from the layer's attention.
    """

    norm: Callable[[Any], Norm]
    """Reads a normalisation from its module."""
    embed: Callable[[Any], Callable[[Tensor, Tensor], Tensor]]
    """The trunk's embedding, see `Plan.embed`."""
    layers: str
    final_norm: str
    attention: str
    qkv: tuple[str, ...]
    """From the attention, and so is `out`."""
    out: str
    input_norm: str
    mlp_norm: str
    up: tuple[str, ...]
    down: str
    act: str
    """The name of a gate, or the path of an activation."""
    out_norm: str | None = None
    down_norm: str | None = None
    rotary: bool = True
    interleaved: bool = False


def _rms(module: Any) -> Norm:
    return Norm(module, module.variance_epsilon)


def _rms_with_offset(module: Any) -> Norm:
    return Norm(module, module.eps, offset=True)


def _layer_norm(module: Any) -> Norm:
    return Norm(module, module.eps, center=True)


_LLAMA = Parts(
    norm=_rms,
    embed=lambda base: lambda ids, positions: base.embed_tokens(ids),
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="o_proj",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    act="silu",
)
_GEMMA = replace(
    _LLAMA,
    norm=_rms_with_offset,
    out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    down_norm="post_feedforward_layernorm",
    act="gelu_tanh",
)
_GPT_NEOX = Parts(
    norm=_layer_norm,
    embed=lambda base: lambda ids, positions: base.embed_in(ids),
    layers="layers",
    final_norm="final_layer_norm",
    attention="attention",
    qkv=("query_key_value",),
    out="dense",
    input_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    act="mlp.act",
    interleaved=True,
)
_GPT2 = Parts(
    norm=_layer_norm,
    embed=lambda base: lambda ids, positions: base.wte(ids) + base.wpe(positions),
    layers="h",
    final_norm="ln_f",
    attention="attn",
    qkv=("c_attn",),
    out="c_proj",
    input_norm="ln_1",
    mlp_norm="ln_2",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    act="mlp.act",
    rotary=False,
)
_OPT = Parts(
    norm=_layer_norm,
    embed=lambda base: (
        lambda ids, positions: (
            base.decoder.embed_tokens(ids)
            + base.decoder.embed_positions(ids, position_ids=positions)
        )
    ),
    layers="decoder.layers",
    final_norm="decoder.final_layer_norm",
    attention="self_attn",
    qkv=("q_proj", "k_proj", "v_proj"),
    out="out_proj",
    input_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    act="activation_fn",
    rotary=False,
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": replace(_LLAMA, qkv=("qkv_proj",), up=("mlp.gate_up_proj",)),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
    "opt": _OPT,
}
"""By `config.model_type`."""
