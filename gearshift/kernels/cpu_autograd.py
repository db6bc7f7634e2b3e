"""Hand-written gradients of a CPU's compiled kernels. Each is one pass, and computes what the
tensor functions of `reference.py` and `autograd.py` compute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.kernels import build
from gearshift.kernels.attention import PackedSequences
from gearshift.kernels.build import pointer
from gearshift.kernels.specs import AttentionOptions, Gate, Norm


def add_norm_arguments(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    total: Tensor,
    out: Tensor,
    norm: Norm,
) -> tuple[float, ...]:
    """`add_norm` writes x + delta into `total` (which may be x), and its norm into `out`."""
    return (
        x.data_ptr(), pointer(delta), weight.data_ptr(), pointer(bias), total.data_ptr(),
        out.data_ptr(), *x.shape, norm.eps, norm.center, norm.offset,
    )  # fmt: skip


def gate_arguments(both: Tensor, out: Tensor, gate: Gate) -> tuple[float, ...]:
    """`gate` writes act(gate) * up of `both` [T, 2F] into `out` [T, F]."""
    return (both.data_ptr(), out.data_ptr(), *out.shape, gate == "gelu_tanh")


class AddNorm(torch.autograd.Function):
    """`Kernels.add_norm` of an RMSNorm, and its gradient in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        total = x if delta is None else torch.empty_like(x)
        out = torch.empty_like(x)
        build.call(
            "add_norm", x.dtype, *add_norm_arguments(x, delta, weight, None, total, out, norm)
        )
        ctx.norm, ctx.added = norm, delta is not None
        ctx.save_for_backward(total, weight)
        return (total.view_as(total) if delta is None else total), out

    @staticmethod
    def backward(ctx: Any, total_grad: Tensor | None, out_grad: Tensor) -> tuple[Any, ...]:
        total, weight = ctx.saved_tensors
        T, C = total.shape
        grad = torch.zeros_like(total) if total_grad is None else total_grad.clone()
        weight_grad = torch.zeros(torch.get_num_threads(), C)
        build.call(
            "add_norm_backward", total.dtype,
            total.data_ptr(), weight.data_ptr(), out_grad.contiguous().data_ptr(),
            grad.data_ptr(), weight_grad.data_ptr(), T, C, ctx.norm.eps, ctx.norm.offset,
        )  # fmt: skip
        return grad, grad if ctx.added else None, weight_grad.sum(0).to(weight.dtype), None


class Rotate(torch.autograd.Function):
    """`Kernels.apply_rotary`; its gradient turns back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> Tensor:
        ctx.kv_heads = kv_heads
        ctx.save_for_backward(cos, sin)
        return _turned(qkv, cos, sin, kv_heads, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.kv_heads, -1.0), None, None, None


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, sign: float) -> Tensor:
    T, heads, D = qkv.shape
    out = qkv.clone(memory_format=torch.contiguous_format)
    build.call(
        "apply_rotary", out.dtype,
        out.data_ptr(), cos.data_ptr(), sin.data_ptr(), T, heads - kv_heads, heads, D,
        cos.shape[-1], sign,
    )  # fmt: skip
    return out


class GateFunction(torch.autograd.Function):
    """`Kernels.act_and_mul`, and its gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(both)
        out = both.new_empty((both.shape[0], both.shape[1] // 2))
        build.call("act_and_mul", both.dtype, *gate_arguments(both, out, gate))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        [both] = ctx.saved_tensors
        out, grad = torch.empty_like(both), grad.contiguous()
        build.call(
            "act_and_mul_backward", both.dtype,
            both.data_ptr(), grad.data_ptr(), out.data_ptr(), *grad.shape,
            ctx.gate == "gelu_tanh",
        )  # fmt: skip
        return out, None


class PackedAttention(torch.autograd.Function):
    """The same, compiled, for bf16 on a CPU: no scores are kept, and nothing is padded."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: PackedSequences,
        options: AttentionOptions,
    ) -> Tensor:
        q, k, v = (x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype)
        norms = torch.empty(q.shape[:2])
        ctx.save_for_backward(q, k, v, out, norms)
        ctx.sequences, ctx.options = sequences, options
        PackedAttention.call("packed_attend", ctx, q, k, v, out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, norms = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        grad = grad.contiguous()
        PackedAttention.call("packed_attend_backward", ctx, q, k, v, out, grad, norms, *grads)
        return *grads, None, None

    @staticmethod
    def call(name: str, ctx: Any, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> None:
        """Run one of the two passes."""
        sequences, options = ctx.sequences, ctx.options
        tensors = (q, k, v, *more, sequences.cu, sequences.parents, sequences.trees)
        steps = (x.stride(0) for x in (q, k, v))
        build.call(
            name, q.dtype, *(x.data_ptr() for x in tensors), len(sequences.trees) - 1, *steps,
            q.shape[1], k.shape[1], q.shape[2], options.scaling, options.window or 0,
        )  # fmt: skip


class TokenLogprobs(torch.autograd.Function):
    """Head, log-softmax, gather and entropy of one chunk, compiled; the same as the other path."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_C: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logits_CV = F.linear(hidden_CH, weight_VH, bias_V)
        C, V = logits_CV.shape
        logprobs_C, entropy_C, norm_C = torch.empty(3, C)
        targets_C = targets_C.contiguous()
        build.call(
            "token_logprobs", logits_CV.dtype, logits_CV.data_ptr(), targets_C.data_ptr(),
            logprobs_C.data_ptr(), entropy_C.data_ptr(), norm_C.data_ptr(), C, V, temperature,
        )  # fmt: skip
        ctx.save_for_backward(hidden_CH, weight_VH, bias_V, targets_C, entropy_C, norm_C)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(
        ctx: Any, logprobs_grad_C: Tensor | None, entropy_grad_C: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_CH, weight_VH, bias_V, targets_C, entropy_C, norm_C = ctx.saved_tensors
        grad_CV = F.linear(hidden_CH, weight_VH, bias_V)  # the logits again, then their gradient
        C, V = grad_CV.shape
        given = [
            torch.zeros(C) if logprobs_grad_C is None else logprobs_grad_C.contiguous(),
            None if entropy_grad_C is None else entropy_grad_C.contiguous(),
        ]
        build.call(
            "token_logprobs_backward", grad_CV.dtype, grad_CV.data_ptr(), targets_C.data_ptr(),
            entropy_C.data_ptr(), norm_C.data_ptr(), *map(build.pointer, given), C, V,
            ctx.temperature,
        )  # fmt: skip
        wanted = ctx.needs_input_grad
        return (
            grad_CV @ weight_VH if wanted[0] else None,
            grad_CV.t() @ hidden_CH if wanted[1] else None,
            grad_CV.sum(0) if wanted[2] else None,
            None,
            None,
        )
