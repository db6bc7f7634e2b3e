"""What an architecture is made of, read off a Hugging Face model: its head, and (where we know it)
a plan by which the generation gear runs it without Hugging Face's modules. Describes; computes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.errors import ModelError
from gearshift.models.logprobs import Head

LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Pre-norm, rotary, gated MLP: the families that `Plan` describes."""


@dataclass(frozen=True)
class LayerPlan:
    """One pre-norm layer. Modules, not tensors: a parameter may be re-pointed later."""

    input_norm: nn.Module
    qkv: tuple[nn.Linear, nn.Linear, nn.Linear]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    out: nn.Linear
    mlp_norm: nn.Module
    gate_up: tuple[nn.Linear, nn.Linear]
    down: nn.Linear
    window: int | None


@dataclass(frozen=True)
class Plan:
    """A decoder that the generation gear can run as plain functions."""

    embedding: nn.Embedding
    rotary: nn.Module
    layers: tuple[LayerPlan, ...]
    final_norm: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    scaling: float


def describe(model: PreTrainedModel) -> Plan | None:
    """The plan of a model we know, or None: it then runs through the Hugging Face forward."""
    config, base = model.config, model.base_model
    if config.model_type not in LLAMA_LIKE or config.hidden_act not in ("silu", "swish"):
        return None
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return None  # the others change their frequencies with the length
    layers = []
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layers.append(
            LayerPlan(
                input_norm=layer.input_layernorm,
                qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
                q_norm=getattr(attention, "q_norm", None),
                k_norm=getattr(attention, "k_norm", None),
                out=attention.o_proj,
                mlp_norm=layer.post_attention_layernorm,
                gate_up=(mlp.gate_proj, mlp.up_proj),
                down=mlp.down_proj,
                window=getattr(attention, "sliding_window", None)
                or (config.sliding_window if config.model_type == "mistral" else None),
            )
        )
    first = base.layers[0].self_attn
    return Plan(
        embedding=base.embed_tokens,
        rotary=base.rotary_emb,
        layers=tuple(layers),
        final_norm=base.norm,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=first.head_dim,
        scaling=first.scaling,
    )


def head_of(model: PreTrainedModel) -> Head:
    """The language-model head, with the scale and soft cap that some families put on logits."""
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear language-model head; load a causal LM."
        )
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(linear, float(scale), getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: PreTrainedModel, hidden_MH: Tensor, input_ids: Tensor) -> None:
    """Compare our head with the model's own logits on a short input; raises `ModelError` if they
    differ.

    It keeps a family whose logits go through something `head_of` does not know from training
    wrongly.
    """
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        theirs = model(input_ids=input_ids[None], use_cache=False).logits[0].float()
    finally:
        model.set_attn_implementation(implementation)
    ours = head_of(model).logits(hidden_MH)
    scale = theirs.abs().max().clamp(min=1.0)
    tolerance = 1e-3 if theirs.dtype == torch.float32 and hidden_MH.dtype == torch.float32 else 0.1
    if not bool((ours - theirs).abs().max() <= tolerance * scale):
        raise ModelError(
            f"The logits of {type(model).__name__} are not those of its head on its hidden states, "
            "so its "
            "log-probabilities would be wrong; this architecture is not supported yet."
        )
