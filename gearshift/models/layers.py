"""A described architecture's layers as plain functions over the aliased weights. Both gears run
them; they differ in how attention finds its keys.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gearshift.batch import PackedBatch
from gearshift.kernels.reference import Kernels
from gearshift.kernels.specs import AttentionOptions, Linear
from gearshift.models.attention import PackedLayout
from gearshift.models.describe import Plan
from gearshift.models.fused import AliasedWeights
from gearshift.models.units import run_in

Angles = list[tuple[Tensor, Tensor]]


class Attention(Protocol):
    """A gear's attention over a layer's queries, keys and values."""

    def __call__(
        self,
        layer: int,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        options: AttentionOptions,
    ) -> Tensor:
        """[T, Q + 2K, D], not yet rotated -> [T, Q, D]."""
        ...


def described_hidden(
    plan: Plan,
    weights: AliasedWeights,
    kernels: Kernels,
    batch: PackedBatch,
    recompute: bool = False,
) -> Tensor:
    """[T, H] last hidden states of a packed batch, with gradients if they are enabled: what
    `hf_hidden` computes through Hugging Face's modules, without dropout. For
    `recompute` see `layers`.
    """
    layout, K = PackedLayout(batch), plan.kv_heads

    def attention(
        layer: int,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        options: AttentionOptions,
    ) -> Tensor:
        turned = kernels.apply_rotary(qkv, rotary, K)
        query, key, value = turned.split((plan.heads, K, K), dim=1)
        return layout.packed(query, key, value, options)

    x, angles = embed(plan, batch.input_ids, batch.position_ids)
    return layers(plan, weights, kernels, x, angles, attention, recompute=recompute)


def embed(plan: Plan, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Angles]:
    """The embeddings [T, H], where the residual stream begins, and each rotary embedding's (cos,
    sin).
    """
    x = plan.embed(input_ids, positions)
    return x, [_angles(rotary(x, positions[None])) for rotary in plan.rotary]


def layers(
    plan: Plan,
    weights: AliasedWeights,
    kernels: Kernels,
    x: Tensor,
    angles: Angles,
    attention: Attention,
    wanted: Tensor | None = None,
    recompute: bool = False,
    multiply: Linear = F.linear,
) -> Tensor:
    """[T, H] -> [T, H] last states, or those of the tokens `wanted` [B]. Without a graph, `x` may
    be overwritten. `recompute` keeps a layer's input only, and computes the layer again in the
    backward pass. For `multiply` see `FusedLinear`.
    """

    def one(i: int, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, before layer i -> the same
        after it. It reads the weights of this layer alone.
        """
        layer, T, D, K = plan.layers[i], len(x), plan.head_size, plan.kv_heads
        heads = plan.heads + 2 * K
        x, h = kernels.add_norm(x, delta, layer.input_norm)
        qkv = weights.qkv[i](h, multiply)
        if layer.interleaved:
            qkv = qkv.view(T, heads // 3, 3, D).transpose(1, 2).contiguous()
        qkv = qkv.view(T, heads, D)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = qkv.split((plan.heads, K, K), dim=1)
            qkv = torch.cat((layer.q_norm.module(q), layer.k_norm.module(k), v), dim=1)
        rotary = None if layer.rotary is None else angles[layer.rotary]
        seen = attention(i, qkv, rotary, layer.attention)
        if layer is plan.layers[-1] and wanted is not None:
            seen, x = seen[wanted], x[wanted]
        a = weights.out[i](seen.flatten(1), multiply)
        if layer.out_norm is not None:
            a = layer.out_norm.module(a)
        if layer.parallel:
            _, h = kernels.add_norm(x, None, layer.mlp_norm)
        else:
            x, h = kernels.add_norm(x, a, layer.mlp_norm)
        up = weights.up[i](h, multiply)
        acted = kernels.act_and_mul(up, layer.act) if isinstance(layer.act, str) else layer.act(up)
        m = weights.down[i](acted, multiply)
        if layer.down_norm is not None:
            m = layer.down_norm.module(m)
        return x, m + a if layer.parallel else m

    delta: Tensor | None = None
    for i, layer in enumerate(plan.layers):
        if recompute and torch.is_grad_enabled():
            x, delta = checkpoint(run_in, layer.unit, one, i, x, delta, use_reentrant=False)
        else:
            x, delta = run_in(layer.unit, one, i, x, delta)
    return kernels.add_norm(x, delta, plan.final_norm)[1]


def _angles(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return cos[0].contiguous(), sin[0].contiguous()
