"""Attention as both gears compute it: one function for the arithmetic, and its entry in Hugging
Face's registry.

What a layer may attend to arrives as an argument of the model's forward (`layout=`), never as a
global.
Legend: B rows, S queries a row, L keys a row, H query heads, K key heads, R = H / K, D head size, T
packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from gearshift.errors import ModelError
from gearshift.types import PackedBatch

ATTENTION = "gearshift"
"""The name under which Hugging Face models find `hf_attention`."""

_PLAIN_SCORES = 2**25
"""Above this many scores a CPU is better off with the blocked kernel, which never stores them."""


class Layout(Protocol):
    """Carries one forward's attention: who sees whom, and where keys are kept."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[B, H, S, D] queries, [B, K, S, D] keys and values -> [B, H, S, D]."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What an architecture asks of its attention beyond the product."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    """A query sees the last `window` positions only."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, o: AttentionOptions) -> Tensor:
    """Grouped-query attention that never repeats keys.

    Args: query [B, H, S, D]; key and value [B, K, L, D]; mask [B, S, L] bool, True where it may
    look.
    Returns [B, H, S, D].
    """
    B, H, S, D = query.shape
    K, L = key.shape[1], key.shape[2]
    plain = o.softcap is not None or (not query.is_cuda and B * H * S * L <= _PLAIN_SCORES)
    if not plain:
        return F.scaled_dot_product_attention(
            query, key, value, mask[:, None], o.dropout, scale=o.scaling, enable_gqa=H != K
        )
    grouped = (query * o.scaling).reshape(B, K, H // K * S, D)
    scores = (grouped @ key.transpose(2, 3)).view(B, K, H // K, S, L)
    if o.softcap is not None:
        scores = torch.tanh(scores / o.softcap) * o.softcap
    scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    if o.dropout:
        weights = F.dropout(weights, o.dropout)
    return (weights.view(B, K, -1, L) @ value).view(B, H, S, D)


def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: [B, H, S, D] in, [B, S, H, D] out."""
    if layout is None:
        raise ModelError(
            "This model was loaded for the engine; to call it directly, first run "
            "model.set_attn_implementation('sdpa')."
        )
    if s_aux is not None:
        raise ModelError(f"{type(module).__name__} uses attention sinks, which are not built yet.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = AttentionOptions(scaling, dropout, sliding_window, softcap)
    layer = int(getattr(module, "layer_idx", 0) or 0)
    return layout.attend(query, key, value, layer, options).transpose(1, 2), None


AttentionInterface.register(ATTENTION, hf_attention)


def require_attention(model: PreTrainedModel) -> None:
    """Raises `ModelError` where the model would ignore a layout: every sequence would see every
    other.
    """
    if model.config._attn_implementation != ATTENTION:
        raise ModelError(
            f"The model's attention is {model.config._attn_implementation!r}; "
            "the engine needs its own: run "
            f"model.set_attn_implementation({ATTENTION!r})."
        )


class PackedLayout:
    """Attention of a `PackedBatch`: each tree (a lone sequence, or a group with its shared prompt)
    is a row.

    Only attention sees rows padded to the longest tree; everything else in the model runs on T
    tokens. A token sees those of its own sequence and of its sequence's ancestors whose position is
    not after its own.
    """

    def __init__(self, batch: PackedBatch) -> None:
        device = batch.input_ids.device
        cu = batch.cu_seqlens
        lengths = cu[1:] - cu[:-1]
        trees = torch.tensor(batch.trees())
        starts, ends = cu[trees[:, 0]], cu[trees[:, 1]]
        slot_L = torch.arange(int((ends - starts).max()))
        index_GL = starts[:, None] + slot_L[None]
        real_GL = index_GL < ends[:, None]
        index_GL = index_GL.clamp(max=len(batch) - 1)
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        ancestor_NN = torch.eye(len(lengths), dtype=torch.bool)
        for child, parent in enumerate(batch.parents.tolist()):
            if parent >= 0:  # parents come first, so their own ancestors are known
                ancestor_NN[child] |= ancestor_NN[parent]
        sequence_GL = sequence_T[index_GL]
        self.position_GL = batch.position_ids.cpu()[index_GL]
        visible = ancestor_NN[sequence_GL[:, :, None], sequence_GL[:, None, :]]
        visible &= self.position_GL[:, None, :] <= self.position_GL[:, :, None]
        visible &= real_GL[:, None, :]
        visible |= ~real_GL[:, :, None]  # a padded query must see something, or softmax makes NaN
        self.mask = visible.to(device)
        self.index_GL = index_GL.to(device)
        self.slot_T = torch.nonzero(real_GL.flatten()).squeeze(1).to(device)
        self.position_GL = self.position_GL.to(device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: int, options: AttentionOptions
    ) -> Tensor:
        """[1, H, T, D] queries, [1, K, T, D] keys and values -> [1, H, T, D]."""
        if len(self.index_GL) == 1:
            return attend(query, key, value, self._mask(options.window), options)
        q, k, v = (x[0][:, self.index_GL].transpose(0, 1) for x in (query, key, value))
        out = attend(q, k, v, self._mask(options.window), options)
        return out.transpose(0, 1).flatten(1, 2)[:, self.slot_T][None]

    def _mask(self, window: int | None) -> Tensor:
        if window is None:
            return self.mask
        distance = self.position_GL[:, :, None] - self.position_GL[:, None, :]
        return self.mask & (distance < window)
