"""One forward of the generation gear: tokens at positions in, last hidden states out, keys and
values cached.

A described architecture runs as plain functions over the aliased buffers; any other through the
Hugging Face forward, with the same cache and the same attention.
Legend: B rows, S tokens a row (1 when decoding), H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from gearshift.engine.cache import CachedLayout
from gearshift.engine.weights import AliasedWeights
from gearshift.models.attention import AttentionOptions
from gearshift.models.describe import Plan


def forward(
    model: PreTrainedModel,
    plan: Plan | None,
    weights: AliasedWeights | None,
    input_ids: Tensor,
    layout: CachedLayout,
) -> Tensor:
    """[B, S] token ids at `layout.where.positions` -> [B, S, H] last hidden states."""
    positions = layout.where.positions
    if plan is not None and weights is not None:
        return _described(plan, weights, input_ids, positions, layout)
    out = model.base_model(
        input_ids=input_ids, position_ids=positions, use_cache=False, layout=layout
    )
    hidden: Tensor = out.last_hidden_state
    return hidden


def _described(
    plan: Plan, weights: AliasedWeights, input_ids: Tensor, positions: Tensor, layout: CachedLayout
) -> Tensor:
    B, S = input_ids.shape
    H, K, D = plan.heads, plan.kv_heads, plan.head_size
    x = F.embedding(input_ids, plan.embedding.weight)
    cos, sin = (t[:, None] for t in plan.rotary(x, positions))
    for i, layer in enumerate(plan.layers):
        qkv_rows, gate_up_rows = weights.qkv[i], weights.gate_up[i]
        qkv = F.linear(layer.input_norm(x), qkv_rows.weight, qkv_rows.bias)
        q, k, v = qkv.view(B, S, H + 2 * K, D).split((H, K, K), dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        seen = layout.attend(q, k, v, i, AttentionOptions(plan.scaling, window=layer.window))
        x = x + layer.out(seen.transpose(1, 2).reshape(B, S, H * D))
        gate, up = F.linear(layer.mlp_norm(x), gate_up_rows.weight, gate_up_rows.bias).chunk(2, -1)
        x = x + layer.down(F.silu(gate) * up)
    return plan.final_norm(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the two halves of a head as real and imaginary part."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin
