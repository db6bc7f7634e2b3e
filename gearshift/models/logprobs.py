"""The one way to compute a log-probability: head, log-softmax, gather and entropy, fused in chunks
of rows.

Legend: M scored tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_ENTRIES = 2**24
"""Entries of [rows, V] that live at once (64 MiB in fp32)."""


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
        logits_MV = self.linear(hidden_MH).float()
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
    logits again (`torch.utils.checkpoint`). Temperature 0 (greedy) scores under temperature 1.
    """
    rows = max(1, _CHUNK_ENTRIES // head.linear.out_features)
    parts = []
    for hidden, targets in zip(hidden_MH.split(rows), targets_M.split(rows), strict=True):
        if torch.is_grad_enabled():
            part = checkpoint(
                _chunk, head, hidden, targets, temperature or 1.0, use_reentrant=False
            )
        else:
            part = _chunk(head, hidden, targets, temperature or 1.0)
        parts.append(part)
    if not parts:
        empty = hidden_MH.sum(-1).float()
        return TokenScores(empty, empty)
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk(
    head: Head, hidden_CH: Tensor, targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_CV = head.logits(hidden_CH) / temperature
    norm_C = torch.logsumexp(logits_CV, -1)
    logprobs_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - norm_C
    entropy_C = norm_C - (torch.softmax(logits_CV, -1) * logits_CV).sum(-1)
    return logprobs_C, entropy_C
