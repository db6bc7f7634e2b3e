"""Hand-written gradients of tensor functions, on any device.

C is the rows of a chunk; `gearshift/types.py` explains the other letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SlicedLinear(torch.autograd.Function):
    """Several linear layers of one input as one product: x weight^T + bias. Each layer's parameter
    is a slice of the weight or of the bias, and gets its slice of the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sizes: Sequence[int],
        transposed: bool,
        *parameters: Tensor,
    ) -> Tensor:
        """`weight` is [sum of sizes, in], or [in, size] of one layer if it is `transposed`, and
        `bias` [sum of sizes]. `parameters` are the layers' weights, then their biases if there is a
        bias.
        """
        ctx.sizes, ctx.transposed, ctx.has_bias = list(sizes), transposed, bias is not None
        weight = weight.t() if transposed else weight
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        layers, wanted = len(ctx.sizes), ctx.needs_input_grad
        x_grad = grad @ weight if wanted[0] else None
        weights: list[Tensor | None] = [None] * layers
        biases: list[Tensor | None] = [None] * layers if ctx.has_bias else []
        if any(wanted[5 : 5 + layers]):
            parts = [x.t() @ grad] if ctx.transposed else (grad.t() @ x).split(ctx.sizes)
            weights = list(parts)
        if any(wanted[5 + layers :]):
            biases = list(grad.sum(0).split(ctx.sizes))
        return x_grad, None, None, None, None, *weights, *biases


class Pick(torch.autograd.Function):
    """x[index]; the gradient comes back from the entries `kept` alone, which pick each row of x at
    most once (None: all do), so that nothing has to be added up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, kept: Tensor | None) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(index, kept)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, kept = ctx.saved_tensors
        if kept is not None:
            index, grad = index[kept], grad[kept]
        back = grad.new_zeros((ctx.rows, *grad.shape[1:]))
        back[index] = grad
        return back, None, None


class Inherit(torch.autograd.Function):
    """x[which] where many entries pick one row: the gradient's sums are one matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, which: Tensor) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(which)
        return x[which]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (which,) = ctx.saved_tensors
        heirs = which[None] == torch.arange(ctx.rows, device=which.device)[:, None]
        return (heirs.to(grad.dtype) @ grad.flatten(1)).view(-1, *grad.shape[1:]), None


class LogSoftmaxAt(torch.autograd.Function):
    """(log p_t, H) of p = softmax(x / T) in few passes over x, which it may overwrite.

    d log p_t / dx = (onehot_t - p) / T and dH / dx = -p (log p + H) / T.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, targets_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        log_p_CV = logits_CV.div_(temperature) if temperature != 1.0 else logits_CV
        log_p_CV = log_p_CV.sub_(torch.logsumexp(log_p_CV, -1, keepdim=True))
        logprobs_C = log_p_CV.gather(1, targets_C[:, None]).squeeze(1)
        entropy_C = -torch.linalg.vecdot(log_p_CV.exp(), log_p_CV)
        ctx.save_for_backward(log_p_CV, targets_C, entropy_C)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_C: Tensor | None, grad_entropy_C: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        log_p_CV, targets_C, entropy_C = ctx.saved_tensors
        grad_CV = log_p_CV.exp()
        weight_C1 = torch.zeros_like(entropy_C)[:, None]
        if grad_logprobs_C is not None:
            weight_C1 = weight_C1 - grad_logprobs_C[:, None]
        if grad_entropy_C is not None:
            surprise_CV = (log_p_CV + entropy_C[:, None]) * grad_entropy_C[:, None]
            grad_CV.mul_(weight_C1 - surprise_CV)
        else:
            grad_CV.mul_(weight_C1)
        if grad_logprobs_C is not None:
            grad_CV.scatter_add_(1, targets_C[:, None], grad_logprobs_C[:, None])
        return (grad_CV / ctx.temperature if ctx.temperature != 1.0 else grad_CV), None, None
