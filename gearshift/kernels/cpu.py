"""The operations of `kernels.py` compiled for this CPU (`runtime/kernels.cpp`), without a graph or
with their gradients, and recordings of their calls.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gearshift.kernels import build
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.batch_invariant import BatchInvariant
from gearshift.kernels.build import pointer
from gearshift.kernels.cpu_autograd import (
    AddNorm,
    GateFunction,
    PackedAttention,
    Rotate,
    TokenLogprobs,
    add_norm_arguments,
    gate_arguments,
)
from gearshift.kernels.reference import Kernels, PrepackedLinear
from gearshift.kernels.specs import AttentionMetadata, AttentionOptions, Gate, Head, Norm, Rotary


class _Memory:
    """What recorded calls write to. It is never given back while a recording may write there; what
    no tensor uses any more serves the next call, of this recording or of another.
    """

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, torch.UntypedStorage]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(shape)
        free = [
            whole
            for whole, storage in self._all
            if whole.dtype == dtype
            and whole.numel() >= numel
            and torch._C._storage_Use_Count(storage._cdata) == 2  # ours
        ]
        if not free:
            free.append(torch.empty(numel, dtype=dtype))
            self._all.append((free[0], free[0].untyped_storage()))
        return min(free, key=Tensor.numel)[:numel].view(shape)

    def at(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Gives that tensor of ours again, without holding its memory till then."""
        shape, pointer = tensor.shape, tensor.data_ptr()
        [whole] = [whole for whole, _ in self._all if whole.data_ptr() == pointer]
        return lambda: whole[: shape.numel()].view(shape)

    def bytes(self) -> int:
        return sum(whole.nbytes for whole, _ in self._all)


class _OnlyKernels(TorchDispatchMode):
    """Notices tensor operations that compute something: a recording would miss them."""

    missed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.missed |= not (func.is_view or func in _ALLOCATES)
        return func(*args, **(kwargs or {}))


_ALLOCATES = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


class CPUKernels(Kernels):
    """The same operations on tensors of one type (fp32 or bf16) in a CPU's memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._memory = _Memory()
        self._calls: list[tuple[int, bytes]] | None = None
        """Those of the recording that is being made."""
        self._multiplies = build.has("prepacked_linear", dtype)
        self._in_rows = build.has("linear", torch.float32)

    def workspace_bytes(self) -> int:
        return self._memory.bytes()

    def capture(
        self, prepare: Callable[[], None], run: Callable[[], Tensor]
    ) -> Callable[[], Tensor] | None:
        prepare()
        calls = self._calls = []
        watch = _OnlyKernels()
        try:
            with watch:
                out = run()
        finally:
            self._calls = None
        if watch.missed:
            self._memory = _Memory()
            return None
        result = self._memory.at(out)
        del out
        table = (c_void_p * (2 * len(calls)))()
        for i, (function, slots) in enumerate(calls):
            table[2 * i] = function
            table[2 * i + 1] = ctypes.cast(ctypes.c_char_p(slots), c_void_p).value

        def again() -> Tensor:
            prepare()
            build.replay()(table, c_int64(len(calls)))  # the table points into `calls`
            return result()

        return again

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
        turned: Tensor = Rotate.apply(qkv, *rotary, kv_heads)
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
        T, H, D = query.shape
        table = metadata.block_tables
        out = self._empty((T, H, D))
        self._call(
            "attend", query.data_ptr(), query.stride(0), store.data_ptr(), table.data_ptr(),
            metadata.seq_ids.data_ptr(), metadata.positions.data_ptr(), out.data_ptr(), T, H,
            store.shape[2], D, table.shape[1], options.scaling,
            options.window or 0, options.softcap or 0.0,
        )  # fmt: skip
        return out

    def act_and_mul(self, both: Tensor, gate: Gate) -> Tensor:
        if torch.is_grad_enabled():
            gated: Tensor = GateFunction.apply(both, gate)
            return gated
        out = self._empty((both.shape[0], both.shape[1] // 2))
        self._call("act_and_mul", *gate_arguments(both, out, gate))
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
        self, hidden_CH: Tensor, head: Head, targets_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        plain, linear = head.scale == 1.0 and head.softcap is None, head.linear
        if not plain or linear.weight.dtype != hidden_CH.dtype:
            return super().token_logprobs(hidden_CH, head, targets_C, temperature)
        scores: tuple[Tensor, Tensor] = TokenLogprobs.apply(
            hidden_CH, linear.weight, linear.bias, targets_C, temperature
        )
        return scores

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        N, K = weight.shape
        fits = x.shape[1:] == (K,) and (bias is None or bias.shape == (N,))
        given = {t.dtype for t in (x, weight, bias) if t is not None}
        if not self._in_rows or not fits or given != {torch.float32} or not K:
            return super().linear(x, weight, bias)  # which also says what does not fit
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        out = self._empty((len(x), N), torch.float32)
        self._call(
            "linear", x.data_ptr(), weight.data_ptr(), pointer(bias), out.data_ptr(),
            len(x), N, K, *weight.stride(), dtype=torch.float32,
        )  # fmt: skip
        return out

    def batch_invariant(self) -> AbstractContextManager[Any]:
        return BatchInvariant(self.linear) if self._in_rows else super().batch_invariant()

    def prepacked_linear(self, weight: Tensor, rows: int) -> PrepackedLinear | None:
        fits = self._multiplies and weight.shape[1] % 2 == 0
        return _PrepackedLinear(self, weight) if fits else super().prepacked_linear(weight, rows)

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

    def _call(self, name: str, *arguments: float, dtype: torch.dtype | None = None) -> None:
        function, slots = build.prepared(name, dtype or self._dtype, *arguments)
        if self._calls is not None:
            self._calls.append((ctypes.cast(function, c_void_p).value or 0, slots))
        function(slots)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if self._calls is not None:
            return self._memory.empty(shape, dtype or self._dtype)
        return torch.empty(shape, dtype=dtype or self._dtype)


class _PrepackedLinear:
    """By a weight packed for `multiply`; packing again keeps its place."""

    def __init__(self, kernels: CPUKernels, weight: Tensor) -> None:
        self._kernels, (self._out, self._in) = kernels, weight.shape
        self._packed = torch.empty(-(-self._out // 16) * 16 * self._in, dtype=weight.dtype)
        self.prepack(weight)

    def prepack(self, weight: Tensor) -> None:
        weight = weight.contiguous()
        self._kernels._call(
            "prepack", weight.data_ptr(), self._packed.data_ptr(), self._out, self._in
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        out = self._kernels._empty((x.shape[0], self._out))
        self._kernels._call(
            "prepacked_linear", x.data_ptr(), self._packed.data_ptr(), pointer(bias),
            out.data_ptr(), x.shape[0], self._out, self._in,
        )  # fmt: skip
        return out
