"""What an architecture is made of, read off a Hugging Face model: its head, and (where we know it)
a plan by which the generation gear runs it without Hugging Face's modules. Describes; computes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.kernels.specs import AttentionOptions, Gate, Head, Norm

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer. Modules, not tensors: a parameter may be re-pointed later.

    a = out(attention(qkv(norm(x))));  x = x + out_norm(a)
    m = down(act(gate) * up);           x = x + down_norm(m)
    """

    unit: nn.Module
    """Hugging Face's decoder layer: see `units.py`."""
    input_norm: Norm
    qkv: tuple[nn.Module, ...]
    """Linear layers whose outputs, end to end, are queries, keys and values."""
    out: nn.Module
    mlp_norm: Norm
    up: tuple[nn.Module, ...]
    """Gate and up, end to end, or one layer where the MLP has no gate."""
    down: nn.Module
    attention: AttentionOptions
    act: Gate | Callable[[Tensor], Tensor]
    """Of the gate, by name; or of an MLP without a gate."""
    rotary: int | None = 0
    """Which of the model's rotary embeddings; None for none."""
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    out_norm: Norm | None = None
    down_norm: Norm | None = None
    parallel: bool = False
    """Attention and MLP both read the layer's input (GPT-NeoX)."""
    interleaved: bool = False
    """`qkv` gives (q, k, v) head by head (GPT-NeoX)."""


@dataclass(frozen=True)
class Plan:
    """A decoder that the generation gear can run as plain functions."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """Token ids [T] and positions [T] -> [T, C]."""
    rotary: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...]
    """Each: (a tensor for its type, positions [1, T]) -> cos and sin [1, T, rotary size]."""
    layers: tuple[LayerPlan, ...]
    final_norm: Norm
    heads: int
    kv_heads: int
    head_size: int


def described(model: PreTrainedModel) -> tuple[Plan | None, str | None]:
    """The plan of a model that is known; or why there is none, so that it runs through Hugging
    Face's forward.
    """
    kind = model.config.model_type
    reader = _READERS.get(kind)
    if reader is None:
        return None, f"its family ({kind}) is not described"
    try:
        return reader(model.config, model.base_model), None
    except _UnknownError as unknown:
        return None, f"{unknown} is not described for its family ({kind})"


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The part that makes hidden states; a few families call the language model itself their base
    (Llama 4).
    """
    base: nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base


def base_layer(module: Module) -> Module:
    """The layer under an adapter, or the layer itself."""
    return getattr(module, "base_layer", module)


def _llama(config: Any, base: Any) -> Plan:
    """Pre-norm, rotary, gated: Llama, Mistral, Qwen 2 and 3, SmolLM 3."""
    _require_act(config.hidden_act, "silu", "swish")
    _require_rotary(config.rope_parameters)
    whole = config.sliding_window if config.model_type == "mistral" else None
    layers = []
    for layer in base.layers:
        a, mlp = layer.self_attn, layer.mlp
        layers.append(
            LayerPlan(
                unit=layer,
                input_norm=_rms(layer.input_layernorm),
                qkv=(a.q_proj, a.k_proj, a.v_proj),
                q_norm=_rms(a.q_norm) if hasattr(a, "q_norm") else None,
                k_norm=_rms(a.k_norm) if hasattr(a, "k_norm") else None,
                out=a.o_proj,
                mlp_norm=_rms(layer.post_attention_layernorm),
                up=(mlp.gate_proj, mlp.up_proj),
                down=mlp.down_proj,
                act="silu",
                rotary=0 if getattr(a, "use_rope", True) else None,
                attention=AttentionOptions(
                    a.scaling, window=getattr(a, "sliding_window", None) or whole
                ),
            )
        )
    return _decoder(config, base, layers, _rms(base.norm), a.head_dim)


def _phi3(config: Any, base: Any) -> Plan:
    _require_act(config.hidden_act, "silu", "swish")
    _require_rotary(config.rope_parameters)
    layers = [
        LayerPlan(
            unit=layer,
            input_norm=_rms(layer.input_layernorm),
            qkv=(layer.self_attn.qkv_proj,),
            out=layer.self_attn.o_proj,
            mlp_norm=_rms(layer.post_attention_layernorm),
            up=(layer.mlp.gate_up_proj,),
            down=layer.mlp.down_proj,
            act="silu",
            attention=AttentionOptions(layer.self_attn.scaling, window=config.sliding_window),
        )
        for layer in base.layers
    ]
    return _decoder(config, base, layers, _rms(base.norm), base.layers[0].self_attn.head_dim)


def _gemma(config: Any, base: Any) -> Plan:
    """Gemma 2 and 3: norms before and after, a soft cap (2) or two rotary embeddings (3)."""
    several = hasattr(base.rotary_emb, "layer_types")
    kinds = list(base.rotary_emb.layer_types) if several else [None]
    ropes = [config.rope_parameters[kind] if kind else config.rope_parameters for kind in kinds]
    _require_act(config.hidden_activation, "gelu_pytorch_tanh")
    for rope in ropes:
        _require_rotary(rope)
    if getattr(config, "use_bidirectional_attention", False):
        raise _UnknownError("attention in both directions")
    layers = []
    for layer in base.layers:
        a, mlp = layer.self_attn, layer.mlp
        layers.append(
            LayerPlan(
                unit=layer,
                input_norm=_rms(layer.input_layernorm, offset=True),
                qkv=(a.q_proj, a.k_proj, a.v_proj),
                q_norm=_rms(a.q_norm, offset=True) if hasattr(a, "q_norm") else None,
                k_norm=_rms(a.k_norm, offset=True) if hasattr(a, "k_norm") else None,
                out=a.o_proj,
                out_norm=_rms(layer.post_attention_layernorm, offset=True),
                mlp_norm=_rms(layer.pre_feedforward_layernorm, offset=True),
                up=(mlp.gate_proj, mlp.up_proj),
                down=mlp.down_proj,
                down_norm=_rms(layer.post_feedforward_layernorm, offset=True),
                act="gelu_tanh",
                rotary=kinds.index(a.layer_type) if several else 0,
                attention=AttentionOptions(
                    a.scaling, window=a.sliding_window, softcap=a.attn_logit_softcapping
                ),
            )
        )
    final = _rms(base.norm, offset=True)
    plan = _decoder(config, base, layers, final, base.layers[0].self_attn.head_dim)
    if not several:
        return plan

    def rotary(kind: Any) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda x, positions: base.rotary_emb(x, positions, kind)

    return Plan(**{**vars(plan), "rotary": tuple(rotary(kind) for kind in kinds)})


def _gpt_neox(config: Any, base: Any) -> Plan:
    _require_rotary(config.rope_parameters)
    layers = [
        LayerPlan(
            unit=layer,
            input_norm=_layer_norm(layer.input_layernorm),
            qkv=(layer.attention.query_key_value,),
            out=layer.attention.dense,
            mlp_norm=_layer_norm(layer.post_attention_layernorm),
            up=(layer.mlp.dense_h_to_4h,),
            down=layer.mlp.dense_4h_to_h,
            act=layer.mlp.act,
            attention=AttentionOptions(layer.attention.scaling),
            parallel=layer.use_parallel_residual,
            interleaved=True,
        )
        for layer in base.layers
    ]
    head_size = base.layers[0].attention.head_size
    return Plan(
        embed=lambda ids, positions: base.embed_in(ids),
        rotary=(base.rotary_emb,),
        layers=tuple(layers),
        final_norm=_layer_norm(base.final_layer_norm),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=head_size,
    )


def _gpt2(config: Any, base: Any) -> Plan:
    layers = [
        LayerPlan(
            unit=block,
            input_norm=_layer_norm(block.ln_1),
            qkv=(block.attn.c_attn,),
            out=block.attn.c_proj,
            mlp_norm=_layer_norm(block.ln_2),
            up=(block.mlp.c_fc,),
            down=block.mlp.c_proj,
            act=block.mlp.act,
            rotary=None,
            attention=AttentionOptions(block.attn.scaling),
        )
        for block in base.h
    ]
    return Plan(
        embed=lambda ids, positions: base.wte(ids) + base.wpe(positions),
        rotary=(),
        layers=tuple(layers),
        final_norm=_layer_norm(base.ln_f),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=base.h[0].attn.head_dim,
    )


def _opt(config: Any, base: Any) -> Plan:
    decoder = base.decoder
    if not config.do_layer_norm_before or decoder.final_layer_norm is None or decoder.project_in:
        raise _UnknownError("a norm after each layer")  # only OPT-350m has it
    layers = [
        LayerPlan(
            unit=layer,
            input_norm=_layer_norm(layer.self_attn_layer_norm),
            qkv=(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=layer.self_attn.out_proj,
            mlp_norm=_layer_norm(layer.final_layer_norm),
            up=(layer.fc1,),
            down=layer.fc2,
            act=layer.activation_fn,
            rotary=None,
            attention=AttentionOptions(layer.self_attn.scaling),
        )
        for layer in decoder.layers
    ]
    return Plan(
        embed=lambda ids, positions: (
            decoder.embed_tokens(ids) + decoder.embed_positions(ids, position_ids=positions)
        ),
        rotary=(),
        layers=tuple(layers),
        final_norm=_layer_norm(decoder.final_layer_norm),
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_size=decoder.layers[0].self_attn.head_dim,
    )


_READERS: dict[str, Callable[[Any, Any], Plan]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "smollm3": _llama,
    "phi3": _phi3,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gpt_neox": _gpt_neox,
    "gpt2": _gpt2,
    "opt": _opt,
}


def _decoder(config: Any, base: Any, layers: list[LayerPlan], final: Norm, head_size: int) -> Plan:
    return Plan(
        embed=lambda ids, positions: base.embed_tokens(ids),
        rotary=(base.rotary_emb,),
        layers=tuple(layers),
        final_norm=final,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
    )


def _rms(module: nn.Module, offset: bool = False) -> Norm:
    eps: float = module.eps if offset else module.variance_epsilon  # type: ignore[assignment]
    return Norm(module, eps, offset=offset)


def _layer_norm(module: nn.LayerNorm) -> Norm:
    return Norm(module, module.eps, center=True)


class _UnknownError(Exception):
    """A part of a model that its family's reader does not know."""


def _require_act(act: Any, *known: str) -> None:
    if act not in known:
        raise _UnknownError(f"the activation {act!r}")


def _require_rotary(rope: dict[str, Any]) -> None:
    """Its frequencies must stay the same at any length."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise _UnknownError(f"a rotary embedding of the type {kind!r}")


def head_of(model: PreTrainedModel) -> Head:
    """The language-model head, with the scale and soft cap that some families put on logits."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear language-model head; load a causal LM."
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(linear, float(scale), getattr(config, "final_logit_softcapping", None))
