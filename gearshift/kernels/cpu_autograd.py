"""Hand-written gradients of the compiled kernels of a CPU. Each is one pass, and computes what the
tensor functions of `reference.py` compute.
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
    """The kernel writes x + delta into `total`, which may be x, and its norm into `out`."""
    return (
        x.data_ptr(), pointer(delta), weight.data_ptr(), pointer(bias), total.data_ptr(),
        out.data_ptr(), *x.shape, norm.eps, norm.center, norm.offset,
    )  # fmt: skip


def act_and_mul_arguments(both: Tensor, out: Tensor, gate: Gate) -> tuple[float, ...]:
    """The kernel writes act(gate) * up of `both` [T, 2F] into `out` [T, F]."""
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
        T, H = total.shape
        grad = torch.zeros_like(total) if total_grad is None else total_grad.clone()
        weight_grad = torch.zeros(torch.get_num_threads(), H)
        build.call(
            "add_norm_backward", total.dtype,
            total.data_ptr(), weight.data_ptr(), out_grad.contiguous().data_ptr(),
            grad.data_ptr(), weight_grad.data_ptr(), T, H, ctx.norm.eps, ctx.norm.offset,
        )  # fmt: skip
        return grad, grad if ctx.added else None, weight_grad.sum(0).to(weight.dtype), None


class ApplyRotary(torch.autograd.Function):
    """`Kernels.apply_rotary`. Its gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> Tensor:
        ctx.kv_heads = kv_heads
        ctx.save_for_backward(cos, sin)
        return _rotated(qkv, cos, sin, kv_heads, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, ctx.kv_heads, -1.0), None, None, None


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, sign: float) -> Tensor:
    T, heads, D = qkv.shape
    out = qkv.clone(memory_format=torch.contiguous_format)
    build.call(
        "apply_rotary", out.dtype,
        out.data_ptr(), cos.data_ptr(), sin.data_ptr(), T, heads - kv_heads, heads, D,
        cos.shape[-1], sign,
    )  # fmt: skip
    return out


class ActAndMul(torch.autograd.Function):
    """`Kernels.act_and_mul`, and its gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, gate: Gate) -> Tensor:
        ctx.gate = gate
        ctx.save_for_backward(both)
        out = both.new_empty((both.shape[0], both.shape[1] // 2))
        build.call("act_and_mul", both.dtype, *act_and_mul_arguments(both, out, gate))
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
    """`PackedSequences.attend` for bf16. It keeps no scores, and pads nothing."""

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
        """Runs one of the two passes."""
        sequences, options = ctx.sequences, ctx.options
        tensors = (q, k, v, *more, sequences.cu, sequences.parents, sequences.trees)
        steps = (x.stride(0) for x in (q, k, v))
        build.call(
            name, q.dtype, *(x.data_ptr() for x in tensors), len(sequences.trees) - 1, *steps,
            q.shape[1], k.shape[1], q.shape[2], options.scaling, options.window or 0,
        )  # fmt: skip


class TokenLogprobs(torch.autograd.Function):
    """`Kernels.token_logprobs` of a head without scale and soft cap."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_M: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logits_MV = F.linear(hidden_MH, weight_VH, bias_V)
        M, V = logits_MV.shape
        logprobs_M, entropy_M, norm_M = torch.empty(3, M)
        targets_M = targets_M.contiguous()
        build.call(
            "token_logprobs", logits_MV.dtype, logits_MV.data_ptr(), targets_M.data_ptr(),
            logprobs_M.data_ptr(), entropy_M.data_ptr(), norm_M.data_ptr(), M, V, temperature,
        )  # fmt: skip
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, targets_M, entropy_M, norm_M)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(
        ctx: Any, logprobs_grad_M: Tensor | None, entropy_grad_M: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, bias_V, targets_M, entropy_M, norm_M = ctx.saved_tensors
        grad_MV = F.linear(hidden_MH, weight_VH, bias_V)  # the logits again, then their gradient
        M, V = grad_MV.shape
        given = [
            torch.zeros(M) if logprobs_grad_M is None else logprobs_grad_M.contiguous(),
            None if entropy_grad_M is None else entropy_grad_M.contiguous(),
        ]
        build.call(
            "token_logprobs_backward", grad_MV.dtype, grad_MV.data_ptr(), targets_M.data_ptr(),
            entropy_M.data_ptr(), norm_M.data_ptr(), *map(build.pointer, given), M, V,
            ctx.temperature,
        )  # fmt: skip
        wanted = ctx.needs_input_grad
        return (
            grad_MV @ weight_VH if wanted[0] else None,
            grad_MV.t() @ hidden_MH if wanted[1] else None,
            grad_MV.sum(0) if wanted[2] else None,
            None,
            None,
        )
