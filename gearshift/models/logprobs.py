"""The one way to compute a log-probability: head, log-softmax, gather and entropy, fused in chunks
of rows.

Legend: M scored tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gearshift.kernels import build as native

_CHUNK_BYTES = 2**27
"""Of the logits that live at once."""


class TokenScores(NamedTuple):
    """What a model says of each scored token of a batch, in nats."""

    logprobs: Tensor
    """[M] float32: log p(token)."""
    entropy: Tensor
    """[M] float32: of the distribution that the token was drawn from."""
    values: Tensor | None = None
    """[M] float32: the value of the state before the token, where a value head was given."""


@dataclass(frozen=True)
class Head:
    """A language-model head on hidden states: logits = softcap(scale * (h W^T + b))."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_MH: Tensor) -> Tensor:
        """[M, V] float32, computed in the head's own precision."""
        return self.shaped(self.linear(hidden_MH)).float()

    def shaped(self, logits_MV: Tensor) -> Tensor:
        """Scale and soft cap on what the linear layer gave: float32, or untouched without them."""
        if self.scale == 1.0 and self.softcap is None:
            return logits_MV
        logits_MV = logits_MV.float()
        if self.scale != 1.0:
            logits_MV = logits_MV * self.scale
        if self.softcap is not None:
            logits_MV = torch.tanh(logits_MV / self.softcap) * self.softcap
        return logits_MV


def token_logprobs(
    head: Head, hidden_MH: Tensor, targets_M: Tensor, temperature: float = 1.0
) -> TokenScores:
    """Log-probability of each target and entropy of its distribution, under softmax(logits /
    temperature).

    `[M, V]` logits never exist: rows go through in chunks, and the backward pass computes a chunk's
    logits again. Temperature 0 (greedy) scores under temperature 1.
    """
    rows = max(1, _CHUNK_BYTES // (head.linear.out_features * hidden_MH.element_size()))
    parts = [
        _score_chunk(head, hidden, targets, temperature or 1.0)
        for hidden, targets in zip(hidden_MH.split(rows), targets_M.split(rows), strict=True)
    ]
    if not parts:
        empty = hidden_MH.sum(-1).float()
        return TokenScores(empty, empty)
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _score_chunk(
    head: Head, hidden_CH: Tensor, targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    plain = head.scale == 1.0 and head.softcap is None
    linear = head.linear
    if plain and native.usable(hidden_CH) and linear.weight.dtype == hidden_CH.dtype:
        scores: tuple[Tensor, Tensor] = _Score.apply(
            hidden_CH, linear.weight, linear.bias, targets_C, temperature
        )
        return scores
    if not torch.is_grad_enabled():
        logprobs_C, entropy_C = _LogSoftmaxAt.apply(head.logits(hidden_CH), targets_C, temperature)
        return logprobs_C, entropy_C

    def chunk(hidden_CH: Tensor) -> tuple[Tensor, Tensor]:
        return _LogSoftmaxAt.apply(head.logits(hidden_CH), targets_C, temperature)

    return checkpoint(chunk, hidden_CH, use_reentrant=False)


class _LogSoftmaxAt(torch.autograd.Function):
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


class _Score(torch.autograd.Function):
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
        native.call(
            "score", logits_CV.dtype, logits_CV.data_ptr(), targets_C.data_ptr(),
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
        native.call(
            "score_backward", grad_CV.dtype, grad_CV.data_ptr(), targets_C.data_ptr(),
            entropy_C.data_ptr(), norm_C.data_ptr(), *map(native.pointer, given), C, V,
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
