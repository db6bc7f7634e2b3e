"""The one way to compute a log-probability: head, log-softmax, gather and entropy, fused in chunks
of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gearshift.kernels.dispatch import kernels_for
from gearshift.kernels.specs import Head

_CHUNK_BYTES = 2**27
"""Bytes of the logits that exist at once."""


class TokenScores(NamedTuple):
    """What a model computes of each scored token of a batch, in nats."""

    logprobs: Tensor
    """[M] float32: log p(token)."""
    entropy: Tensor
    """[M] float32: the entropy of the distribution that the token was sampled from."""
    values: Tensor | None = None
    """[M] float32: the value of the state before the token, where a value head was given."""


def token_logprobs(
    head: Head, hidden_MH: Tensor, targets_M: Tensor, temperature: float = 1.0
) -> TokenScores:
    """Log-probability of each target and entropy of its distribution, under softmax(logits /
    temperature).

    `[M, V]` logits never exist: rows go through in chunks, and the backward pass computes a chunk's
    logits again. Temperature 0 (greedy) scores under temperature 1.
    """
    rows = max(1, _CHUNK_BYTES // (head.linear.out_features * hidden_MH.element_size()))
    kernels = kernels_for(hidden_MH)
    parts = [
        kernels.token_logprobs(hidden, head, targets, temperature or 1.0)
        for hidden, targets in zip(hidden_MH.split(rows), targets_M.split(rows), strict=True)
    ]
    if not parts:
        empty = hidden_MH.sum(-1).float()
        return TokenScores(empty, empty)
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))
