"""The operations of both gears as tensor functions, on any device. The other kernels compute the
same functions with the same rounding, and tests compare them with these.

F is the MLP's size here; S is the tokens of a sequence, and L the positions that they look at.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gearshift.kernels.attention import PackedSequences, attend
from gearshift.kernels.autograd import LogSoftmaxAt
from gearshift.kernels.specs import (
    BLOCK,
    VOCABULARY_BLOCK,
    AttentionMetadata,
    AttentionOptions,
    Gate,
    Head,
    Norm,
    Prepare,
    Rotary,
    Run,
)


class PrepackedLinear(Protocol):
    """x [T, in] -> x weight^T + bias [T, out], by a copy of the weight in another layout."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...

    def prepack(self, weight: Tensor) -> None:
        """Copy the weight again, to the same place."""


class Kernels:
    """Every operation as tensor functions; `CPUKernels` and `TritonKernels` replace some."""

    captures_ahead = False
    """Whether the steps of all sizes are captured before the first token, each with room for the
    longest sequence. Otherwise a step is captured when it is first used.
    """

    def padded_rows(self, rows: int) -> int:
        """The number of rows of the captured step that is used for this many rows."""
        return rows

    def capture(self, prepare: Prepare, run: Run) -> Run | None:
        """A function that does `prepare(); run()` faster, each time that it is called; None where
        there is none. Both are called once or twice here.

        The tensors that they read and write must keep their place. The result of `run` is valid
        until another captured function is called.
        """
        return None

    def workspace_bytes(self) -> int:
        """Bytes that captured functions write to."""
        return 0

    def free_workspace(self) -> None:
        """Free these bytes. No captured function is used again."""

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        """[T, H] each: the residual stream x + delta, and its norm. `x` may be overwritten."""
        x = x if delta is None else x + delta
        return x, norm.module(x)

    def apply_rotary(self, qkv: Tensor, rotary: Rotary | None, kv_heads: int) -> Tensor:
        """qkv [T, Q + 2K, D], with queries and keys rotated."""
        if rotary is None:
            return qkv
        turned, value = qkv.split((qkv.shape[1] - kv_heads, kv_heads), dim=1)
        return torch.cat((_rotate(turned, *rotary), value), dim=1)

    def apply_rotary_and_write(
        self,
        qkv: Tensor,
        rotary: Rotary | None,
        store: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """qkv [T, Q + 2K, D]: rotates queries and keys, stores keys and values, and returns the
        queries [T, Q, D].
        """
        K, D = store.shape[2], qkv.shape[2]
        qkv = self.apply_rotary(qkv, rotary, K)
        query, key, value = qkv.split((qkv.shape[1] - 2 * K, K, K), dim=1)
        blocks, inside = metadata.slot_mapping // BLOCK, metadata.slot_mapping % BLOCK
        keys, values = cached(store, D)
        keys[blocks, :, :, inside] = key.unflatten(-1, (D // 2, 2))
        values[blocks, :, inside // 2, :, inside % 2] = value
        return query

    def attend(
        self, query: Tensor, store: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        """[T, Q, D] queries, each over the stored keys up to its own position -> [T, Q, D]."""
        D = query.shape[2]
        keys, values = cached(store, D)
        # [B, W, K, D / 2, P, 2] and [B, W, K, P / 2, D, 2] -> [B, K, W * P, D]
        key = keys[metadata.blocks].permute(0, 2, 1, 4, 3, 5).flatten(4).flatten(2, 3)
        value = values[metadata.blocks].permute(0, 2, 1, 3, 5, 4).flatten(2, 4)
        mask = metadata.seen(options.window)
        padded = query[metadata.padded].transpose(1, 2)  # [B, Q, S, D]
        out = attend(padded, key, value, mask, options)
        return out.transpose(1, 2).flatten(0, 1)[metadata.flat]

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        options: AttentionOptions,
    ) -> Tensor:
        """[T, heads, D] queries, keys and values of packed sequences -> [T, Q, D]."""
        return sequences.attend(q, k, v, options)

    def act_and_mul(self, both: Tensor, gate: Gate) -> Tensor:
        """[T, 2F] gate and up -> [T, F] act(gate) * up."""
        left, up = both.chunk(2, -1)
        return (F.silu(left) if gate == "silu" else F.gelu(left, approximate="tanh")) * up

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] weight^T + bias [T, out]. Where it is compiled, the result of a row does not
        depend on the rows beside it.
        """
        return F.linear(x, weight, bias)

    def batch_invariant(self) -> AbstractContextManager[Any]:
        """A context in which a model's own modules compute a row independently of the rows beside
        it, as far as `linear` does.
        """
        return nullcontext()

    def prepacked_linear(self, weight: Tensor, rows: int) -> PrepackedLinear | None:
        """The product with a copy of this weight [out, in], in a layout for about `rows` rows. None
        where no layout is faster: it takes bf16, and a CPU that multiplies bf16.
        """
        if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
            return None
        if not torch.backends.mkldnn.is_available():
            return None
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
        return _MkldnnLinear(weight, rows)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
    ) -> None:
        """Samples by inverse CDF from logits [B, V], float32 temperatures [B] (0 takes the most
        likely token), and float64 uniforms [B] in (0, 1). Writes `tokens` [B], and `logprobs` [B]
        float32, their log-probabilities under softmax(logits / temperature), with temperature 1
        where it is 0.
        """
        greedy = temperature == 0
        scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
        norm = torch.logsumexp(scaled, -1)
        drawn = inverse_cdf(torch.exp(scaled - norm[:, None]), uniforms)
        tokens.copy_(torch.where(greedy, scaled.argmax(-1), drawn))
        logprobs.copy_(scaled.gather(1, tokens[:, None]).squeeze(1) - norm)

    def token_logprobs(
        self, hidden_MH: Tensor, head: Head, targets_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """[M] float32 each, with gradients: the log-probability of each target under softmax(logits
        / temperature), and the entropy. The backward pass computes the logits again.
        """

        def chunk(hidden_MH: Tensor) -> tuple[Tensor, Tensor]:
            return LogSoftmaxAt.apply(head.logits(hidden_MH), targets_M, temperature)

        if torch.is_grad_enabled():
            return checkpoint(chunk, hidden_MH, use_reentrant=False)
        return chunk(hidden_MH)


class _MkldnnLinear:
    """The prepacked product of oneDNN."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._rows = rows
        self.prepack(weight)

    def prepack(self, weight: Tensor) -> None:
        self._prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), self._rows)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._prepacked, bias, "none", [], "")
        return y


def cached(store: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """Views of a layer's store: keys [blocks, K, D / 2, P, 2], values [blocks, K, P / 2, D, 2]."""
    keys = store[:, 0].unflatten(-1, (D // 2, BLOCK, 2))
    return keys, store[:, 1].unflatten(-1, (BLOCK // 2, D, 2))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first dimensions of [T, heads, D]: one half of them is the real part,
    the other half the imaginary part.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    left, right = turned.chunk(2, -1)
    turned = turned * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """[B] int64: the token at which the running sum of weights first exceeds uniform * total.

    It has two levels, so that no running sum goes over all of V: first the block, then the token
    inside it. Weights need not be normalised; a token of weight 0 is never sampled.
    """
    (B, V), size = weights_BV.shape, VOCABULARY_BLOCK
    blocks = -(-V // size)
    padded = torch.nn.functional.pad(weights_BV, (0, blocks * size - V)).view(B, blocks, size)
    block_ends_BG = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target_B1 = (uniforms_B * block_ends_BG[:, -1])[:, None]
    block_B1 = torch.searchsorted(block_ends_BG, target_B1, right=True).clamp(max=blocks - 1)
    before_B1 = torch.where(block_B1 > 0, block_ends_BG.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, block_B1[:, :, None].expand(B, 1, size)).squeeze(1)
    ends = inside.double().cumsum(-1)
    token_B1 = torch.searchsorted(ends, target_B1 - before_B1, right=True)
    # Rounding may push the target past the block's own sum: take its last token that can be
    # sampled.
    slots = torch.arange(size, device=weights_BV.device)
    last_B1 = torch.where(inside > 0, slots, 0).amax(-1, keepdim=True)
    return (block_B1 * size + torch.minimum(token_B1, last_B1)).squeeze(1)
