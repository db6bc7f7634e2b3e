"""Rows and masks: between flat and padded, means, whitening, and what each token counts for in a
loss.

Tensors only. Legend: N completions, A the longest, M all policy tokens, flat in completion order.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def row_mask(counts_N: Tensor) -> Tensor:
    """[N] token counts -> [N, A] bool, True on the first `count` places of each row."""
    longest = int(counts_N.max()) if counts_N.numel() else 0
    return torch.arange(longest, device=counts_N.device)[None] < counts_N[:, None]


def pad_rows(values_M: Tensor, counts_N: Tensor) -> Tensor:
    """[M] flat values -> [N, A] padded with 0. Raises ValueError unless the counts add up to M."""
    if len(values_M) != int(counts_N.sum()):
        raise ValueError(f"{len(values_M)} values do not fill {int(counts_N.sum())} places.")
    mask_NA = row_mask(counts_N)
    values_NA = torch.zeros(mask_NA.shape, dtype=values_M.dtype, device=values_M.device)
    return values_NA.masked_scatter(mask_NA, values_M)


def unpad_rows(values_NA: Tensor, mask_NA: Tensor) -> Tensor:
    """[N, A] padded values -> [M] flat ones, row by row."""
    return values_NA[mask_NA]


def row_sums(values_M: Tensor, counts_N: Tensor) -> Tensor:
    """[M] flat values -> [N] sums of each row's; gradients flow."""
    which_M = torch.repeat_interleave(torch.arange(len(counts_N), device=counts_N.device), counts_N)
    zeros_N = torch.zeros(len(counts_N), dtype=values_M.dtype, device=values_M.device)
    return zeros_N.index_add(0, which_M, values_M)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is True; 0 where there are none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """[3] count, sum and sum of squares of the masked entries, in float64: what adds up across
    ranks, so that all whiten by the same figures.
    """
    kept = values.double().masked_fill(~mask, 0.0)
    return torch.stack([mask.sum().double(), kept.sum(), (kept**2).sum()])


def whiten(
    values: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    moments: Tensor | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the masked entries, 0 elsewhere; `shift_mean=False`
    gives the mean back.

    The variance is the biased one. A single entry becomes 0 (or stays its mean). `moments` are
    those of all ranks, added up; without, the values' own.
    """
    if moments is None:
        mean = masked_mean(values, mask)
        variance = masked_mean((values - mean) ** 2, mask)
    else:
        count, total, squares = moments.unbind()
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0.0).to(values.dtype)
        mean = mean.to(values.dtype)
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def whiten_groups(values_NA: Tensor, mask_NA: Tensor, group_N: Tensor) -> Tensor:
    """[N, A] each group's tokens whitened by that group's own mean and variance."""
    out_NA = torch.zeros_like(values_NA)
    for group in torch.unique(group_N):
        rows = group_N == group
        out_NA[rows] = whiten(values_NA[rows], mask_NA[rows])
    return out_NA


def loss_weights(counts_N: Tensor, mode: Aggregation, length: int | None = None) -> Tensor:
    """[M] what each token counts for, so that sum(weights * loss) is the batch's loss however it is
    split.

    token_mean: 1 / M (DAPO). sequence_mean: 1 / (N * own length) (GRPO as published). fixed_length:
    1 / (N * `length`) (Dr. GRPO). N counts completions with at least one token.
    """
    counts_M = torch.repeat_interleave(counts_N, counts_N).float()
    rows = (counts_N > 0).sum().clamp(min=1)
    if mode == "token_mean":
        return torch.ones_like(counts_M) / counts_N.sum().clamp(min=1)
    if mode == "sequence_mean":
        return 1.0 / (rows * counts_M)
    if mode == "fixed_length" and length:
        return torch.ones_like(counts_M) / (rows * length)
    raise ValueError(f"Aggregation {mode!r} is not known, or lacks its length.")
