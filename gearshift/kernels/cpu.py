"""The operations of `reference.py`, compiled for this CPU from `cpp/`: without a graph, or with
gradients by `cpu_autograd.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gearshift.kernels import build
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.batch_invariant import BatchInvariant
from gearshift.kernels.build import pointer
from gearshift.kernels.capture import KernelCalls
from gearshift.kernels.cpu_autograd import (
    ActAndMul,
    AddNorm,
    ApplyRotary,
    PackedAttention,
    TokenLogprobs,
    act_and_mul_arguments,
    add_norm_arguments,
)
from gearshift.kernels.reference import Kernels, PrepackedLinear
from gearshift.kernels.specs import (
    AttentionMetadata,
    AttentionOptions,
    Gate,
    Head,
    Norm,
    Prepare,
    Rotary,
    Run,
)


class CPUKernels(Kernels):
    """The operations on tensors of one type, fp32 or bf16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._calls = KernelCalls(dtype)
        self._call, self._empty = self._calls.call, self._calls.empty
        self._has_prepacked_linear = build.has("prepacked_linear", dtype)
        self._has_linear = build.has("linear", torch.float32)

    def workspace_bytes(self) -> int:
        return self._calls.bytes()

    def free_workspace(self) -> None:
        self._calls.free()

    def capture(self, prepare: Prepare, run: Run) -> Run | None:
        return self._calls.capture(prepare, run)

    def add_norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
        own = norm.module._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if torch.is_grad_enabled():
            if weight is None or norm.center:
                return super().add_norm(x, delta, norm)
            both: tuple[Tensor, Tensor] = AddNorm.apply(x, delta, weight, norm)
            return both
        if weight is None:
            return super().add_norm(x, delta, norm)
        out = self._empty(x.shape)
        self._call("add_norm", *add_norm_arguments(x, delta, weight, bias, x, out, norm))
        return x, out

    def apply_rotary(self, qkv: Tensor, rotary: Rotary | None, kv_heads: int) -> Tensor:
        if rotary is None or not torch.is_grad_enabled():
            return super().apply_rotary(qkv, rotary, kv_heads)
        turned: Tensor = ApplyRotary.apply(qkv, *rotary, kv_heads)
        return turned

    def apply_rotary_and_write(
        self,
        qkv: Tensor,
        rotary: Rotary | None,
        store: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        T, heads, D = qkv.shape
        K = store.shape[2]
        cos, sin = rotary or (None, None)
        self._call(
            "apply_rotary_and_write", qkv.data_ptr(), pointer(cos), pointer(sin), store.data_ptr(),
            metadata.slot_mapping.data_ptr(), T, heads - 2 * K, K, D,
            0 if cos is None else cos.shape[-1],
        )  # fmt: skip
        return qkv[:, : heads - 2 * K]

    def attend(
        self, query: Tensor, store: Tensor, metadata: AttentionMetadata, options: AttentionOptions
    ) -> Tensor:
        T, Q, D = query.shape
        table = metadata.block_tables
        out = self._empty((T, Q, D))
        self._call(
            "attend", query.data_ptr(), query.stride(0), store.data_ptr(), table.data_ptr(),
            metadata.seq_ids.data_ptr(), metadata.positions.data_ptr(), out.data_ptr(), T, Q,
            store.shape[2], D, table.shape[1], options.scaling,
            options.window or 0, options.softcap or 0.0,
        )  # fmt: skip
        return out

    def act_and_mul(self, both: Tensor, gate: Gate) -> Tensor:
        if torch.is_grad_enabled():
            gated: Tensor = ActAndMul.apply(both, gate)
            return gated
        out = self._empty((both.shape[0], both.shape[1] // 2))
        self._call("act_and_mul", *act_and_mul_arguments(both, out, gate))
        return out

    def attend_packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        options: AttentionOptions,
    ) -> Tensor:
        plain = options.softcap is None and not options.dropout and q.shape[-1] % 2 == 0
        if not (plain and build.has("packed_attend", q.dtype) and sequences.consecutive):
            return super().attend_packed(q, k, v, sequences, options)
        seen: Tensor = PackedAttention.apply(q, k, v, sequences, options)
        return seen

    def token_logprobs(
        self, hidden_MH: Tensor, head: Head, targets_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        plain, linear = head.scale == 1.0 and head.softcap is None, head.linear
        if not plain or linear.weight.dtype != hidden_MH.dtype:
            return super().token_logprobs(hidden_MH, head, targets_M, temperature)
        scores: tuple[Tensor, Tensor] = TokenLogprobs.apply(
            hidden_MH, linear.weight, linear.bias, targets_M, temperature
        )
        return scores

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        N, K = weight.shape
        fits = x.shape[1:] == (K,) and (bias is None or bias.shape == (N,))
        given = {t.dtype for t in (x, weight, bias) if t is not None}
        if not self._has_linear or not fits or given != {torch.float32} or not K:
            return super().linear(x, weight, bias)  # this call names the argument that does not fit
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        out = self._empty((len(x), N), torch.float32)
        self._call(
            "linear", x.data_ptr(), weight.data_ptr(), pointer(bias), out.data_ptr(),
            len(x), N, K, *weight.stride(), dtype=torch.float32,
        )  # fmt: skip
        return out

    def batch_invariant(self) -> AbstractContextManager[Any]:
        return BatchInvariant(self.linear) if self._has_linear else super().batch_invariant()

    def prepacked_linear(self, weight: Tensor, rows: int) -> PrepackedLinear | None:
        fits = self._has_prepacked_linear and weight.shape[1] % 2 == 0
        if not fits:
            return super().prepacked_linear(weight, rows)
        return _PrepackedLinear(self._calls, weight)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        uniforms: Tensor,
        tokens: Tensor,
        logprobs: Tensor,
    ) -> None:
        self._call(
            "sample", logits.data_ptr(), temperature.data_ptr(), uniforms.data_ptr(),
            tokens.data_ptr(), logprobs.data_ptr(), *logits.shape, dtype=logits.dtype,
        )  # fmt: skip


class _PrepackedLinear:
    """A copy of a weight for the kernel `prepacked_linear`. It keeps its place when it is written
    again.
    """

    def __init__(self, calls: KernelCalls, weight: Tensor) -> None:
        self._calls, (self._out, self._in) = calls, weight.shape
        self._prepacked = torch.empty(-(-self._out // 16) * 16 * self._in, dtype=weight.dtype)
        self.prepack(weight)

    def prepack(self, weight: Tensor) -> None:
        weight = weight.contiguous()
        self._calls.call(
            "prepack", weight.data_ptr(), self._prepacked.data_ptr(), self._out, self._in
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        out = self._calls.empty((x.shape[0], self._out))
        self._calls.call(
            "prepacked_linear", x.data_ptr(), self._prepacked.data_ptr(), pointer(bias),
            out.data_ptr(), x.shape[0], self._out, self._in,
        )  # fmt: skip
        return out
