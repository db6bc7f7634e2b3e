"""One forward of the generation gear: tokens at places in, last hidden states out, keys and values
cached.

A described architecture runs as plain functions over the aliased buffers; any other through the
Hugging Face forward, with the same cache and the same attention.
Legend: T tokens, C hidden, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gearshift.engine.cache import BlockCache
from gearshift.engine.kernels import Kernels, Places
from gearshift.engine.weights import AliasedWeights
from gearshift.models.attention import AttentionOptions
from gearshift.models.describe import Plan


def described(
    plan: Plan,
    weights: AliasedWeights,
    kernels: Kernels,
    cache: BlockCache,
    input_ids: Tensor,
    places: Places,
) -> Tensor:
    """[T] token ids at `places` -> [B, C] states of the wanted ones, through the plan."""
    T, D, K = len(input_ids), plan.head_size, plan.kv_heads
    heads = plan.heads + 2 * K
    x = plan.embed(input_ids, places.positions)
    angles = [_angles(rotary(x, places.positions[None])) for rotary in plan.rotary]
    x, h = kernels.add_norm(x, None, plan.layers[0].input_norm)
    following = [*(layer.input_norm for layer in plan.layers[1:]), plan.final_norm]
    for i, (layer, next_norm) in enumerate(zip(plan.layers, following, strict=True)):
        qkv = weights.qkv[i](h)
        if layer.interleaved:
            qkv = qkv.view(T, heads // 3, 3, D).transpose(1, 2).contiguous()
        qkv = qkv.view(T, heads, D)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k, v = qkv.split((plan.heads, K, K), dim=1)
            qkv = torch.cat((layer.q_norm.module(q), layer.k_norm.module(k), v), dim=1)
        store = cache.layer(i, qkv[:, :K])
        rotary = None if layer.rotary is None else angles[layer.rotary]
        query = kernels.rotate_and_write(qkv, rotary, store, places)
        seen = kernels.attend(query, store, places, layer.attention)
        if layer is plan.layers[-1] and places.wanted is not None:
            seen, x, h = seen[places.wanted], x[places.wanted], h[places.wanted]
        a = weights.out[i](seen.flatten(1))
        if layer.out_norm is not None:
            a = layer.out_norm.module(a)
        if layer.parallel:
            _, h = kernels.add_norm(x, None, layer.mlp_norm)
        else:
            x, h = kernels.add_norm(x, a, layer.mlp_norm)
        up = weights.up[i](h)
        m = weights.down[i](
            kernels.gate(up, layer.act) if isinstance(layer.act, str) else layer.act(up)
        )
        if layer.down_norm is not None:
            m = layer.down_norm.module(m)
        x, h = kernels.add_norm(x, m + a if layer.parallel else m, next_norm)
    return h


def _angles(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = rotary
    return cos[0].contiguous(), sin[0].contiguous()


def generic(
    model: PreTrainedModel,
    kernels: Kernels,
    cache: BlockCache,
    input_ids: Tensor,
    places: Places,
) -> Tensor:
    """[T] token ids at `places` -> [B, C] states of the wanted ones, through Hugging Face's own
    modules.
    """
    out = model.base_model(
        input_ids=input_ids[None],
        position_ids=places.positions[None],
        use_cache=False,
        layout=CachedLayout(kernels, cache, places),
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden if places.wanted is None else hidden[places.wanted]


class CachedLayout:
    """The attention of a Hugging Face model in the generation gear: write, then look."""

    def __init__(self, kernels: Kernels, cache: BlockCache, places: Places) -> None:
        self.kernels, self.cache, self.places = kernels, cache, places

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, H, T, D] queries, [1, K, T, D] new keys and values -> [1, H, T, D]."""
        qkv = torch.cat((query[0], key[0], value[0])).transpose(0, 1).contiguous()
        store = self.cache.layer(layer, qkv[:, : key.shape[1]])
        query = self.kernels.rotate_and_write(qkv, None, store, self.places)
        return self.kernels.attend(query, store, self.places, options).transpose(0, 1)[None]
