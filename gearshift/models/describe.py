"""Reads the parts of an architecture from a Hugging Face model: its head, and a plan by which a
described one (`families.py`) runs without Hugging Face's modules. It computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.kernels.specs import AttentionOptions, Gate, Head, Norm
from gearshift.models.families import FAMILIES, GATES, Parts

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer. It holds modules, not tensors: a parameter may be re-pointed later.

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
    """The name of the gate, or the activation of an MLP without a gate."""
    rotary: int | None = 0
    """The index of the rotary embedding that the layer uses; None where it uses none."""
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
    """A decoder that runs as plain functions, in both gears."""

    embed: Callable[[Tensor, Tensor], Tensor]
    """Token ids [T] and positions [T] -> [T, H]."""
    rotary: tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ...]
    """Each: (a tensor for its type, positions [1, T]) -> cos and sin [1, T, rotary size]."""
    layers: tuple[LayerPlan, ...]
    final_norm: Norm
    heads: int
    kv_heads: int
    head_size: int


def described(model: PreTrainedModel) -> tuple[Plan | None, str | None]:
    """The plan of a known model; or the reason why there is none, so that it runs through Hugging
    Face's forward.
    """
    kind = model.config.model_type
    parts = FAMILIES.get(kind)
    if parts is None:
        return None, f"its family ({kind}) is not described"
    try:
        return _read(parts, model.config, model.base_model), None
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


def _read(parts: Parts, config: Any, base: Any) -> Plan:
    """Read the plan. Raises `_UnknownError` for a model with other parts."""
    final_norm = _at(base, parts.final_norm)
    # Gemma 3 has a rotary embedding for each kind of layer.
    kinds = list(getattr(base.rotary_emb, "layer_types", ())) if parts.rotary else []
    _require_known(parts, config, kinds)
    # Of all OPT models only OPT-350m has none.
    if final_norm is None or not getattr(config, "do_layer_norm_before", True):
        raise _UnknownError("a norm after each layer")
    layers = [_layer(parts, config, layer, kinds) for layer in _at(base, parts.layers)]
    one = _at(_at(base, parts.layers)[0], parts.attention)
    return Plan(
        embed=parts.embed(base),
        rotary=tuple(_rotary(base, kind) for kind in kinds or [None]) if parts.rotary else (),
        layers=tuple(layers),
        final_norm=parts.norm(final_norm),
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
        head_size=one.head_dim if hasattr(one, "head_dim") else one.head_size,
    )


def _layer(parts: Parts, config: Any, layer: nn.Module, kinds: list[str]) -> LayerPlan:
    attention: Any = _at(layer, parts.attention)

    def norm(module: Any, path: str | None) -> Norm | None:
        found = None if path is None else getattr(module, path, None)
        return None if found is None else parts.norm(found)

    rotary = kinds.index(attention.layer_type) if kinds else 0
    has_rotary = parts.rotary and getattr(attention, "use_rope", True)
    of_config = config.sliding_window if config.model_type in ("mistral", "phi3") else None
    return LayerPlan(
        unit=layer,
        input_norm=parts.norm(_at(layer, parts.input_norm)),
        qkv=tuple(_at(attention, path) for path in parts.qkv),
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        out=_at(attention, parts.out),
        out_norm=norm(layer, parts.out_norm),
        mlp_norm=parts.norm(_at(layer, parts.mlp_norm)),
        up=tuple(_at(layer, path) for path in parts.up),
        down=_at(layer, parts.down),
        down_norm=norm(layer, parts.down_norm),
        act=cast(Gate, parts.act) if parts.act in GATES else _at(layer, parts.act),
        rotary=rotary if has_rotary else None,
        attention=AttentionOptions(
            attention.scaling,
            window=getattr(attention, "sliding_window", None) or of_config,
            softcap=getattr(attention, "attn_logit_softcapping", None),
        ),
        parallel=getattr(layer, "use_parallel_residual", False),
        interleaved=parts.interleaved,
    )


def _rotary(base: Any, kind: str | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if kind is None:
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = base.rotary_emb
        return rotary
    return lambda x, positions: base.rotary_emb(x, positions, kind)


def _at(module: Any, path: str) -> Any:
    return attrgetter(path)(module)


class _UnknownError(Exception):
    """A part of a model that its family's reader does not know."""


def _require_known(parts: Parts, config: Any, kinds: list[str]) -> None:
    if parts.act in GATES:
        act = getattr(config, "hidden_activation", None) or config.hidden_act
        if act not in GATES[parts.act]:
            raise _UnknownError(f"the activation {act!r}")
    ropes = config.rope_parameters if parts.rotary else {}
    for rope in [ropes[kind] for kind in kinds] or [ropes]:
        how = rope.get("rope_type", "default")
        if how not in ("default", "linear", "llama3"):  # others follow the length of a batch
            raise _UnknownError(f"a rotary embedding of the type {how!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise _UnknownError("attention in both directions")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise _UnknownError("a projection of its embeddings")


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
