"""Hand-written gradients of tensor functions, on any device."""

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
    """x[index]. The gradient of each entry goes to the row of x that `target` names (None means the
    index), and len(x) names no row. Each row is named at most once, so that nothing has to be added
    up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, target: Tensor | None) -> Tensor:
        ctx.rows = len(x)
        ctx.save_for_backward(index if target is None else target)
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (target,) = ctx.saved_tensors
        back = grad.new_zeros((ctx.rows + 1, *grad.shape[target.dim() :]))
        back[target] = grad
        return back[:-1], None, None


class Inherit(torch.autograd.Function):
    """x[which], where many entries pick one row. The gradient is one matrix product."""

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
        ctx: Any, logits_MV: Tensor, targets_M: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        log_p_MV = logits_MV.div_(temperature) if temperature != 1.0 else logits_MV
        log_p_MV = log_p_MV.sub_(torch.logsumexp(log_p_MV, -1, keepdim=True))
        logprobs_M = log_p_MV.gather(1, targets_M[:, None]).squeeze(1)
        entropy_M = -torch.linalg.vecdot(log_p_MV.exp(), log_p_MV)
        ctx.save_for_backward(log_p_MV, targets_M, entropy_M)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_M, entropy_M

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_M: Tensor | None, grad_entropy_M: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        log_p_MV, targets_M, entropy_M = ctx.saved_tensors
        grad_MV = log_p_MV.exp()
        weight_M1 = torch.zeros_like(entropy_M)[:, None]
        if grad_logprobs_M is not None:
            weight_M1 = weight_M1 - grad_logprobs_M[:, None]
        if grad_entropy_M is not None:
            surprise_MV = (log_p_MV + entropy_M[:, None]) * grad_entropy_M[:, None]
            grad_MV.mul_(weight_M1 - surprise_MV)
        else:
            grad_MV.mul_(weight_M1)
        if grad_logprobs_M is not None:
            grad_MV.scatter_add_(1, targets_M[:, None], grad_logprobs_M[:, None])
        return (grad_MV / ctx.temperature if ctx.temperature != 1.0 else grad_MV), None, None
