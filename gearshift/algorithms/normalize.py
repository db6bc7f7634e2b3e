"""Sums and whitening over completions, and the weight of each token in a loss.

Tensors only: [M] tokens that the policy wrote, completion after completion, [N] completions, and A
tokens of the longest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "fixed_length"]


def row_mask(lengths_N: Tensor) -> Tensor:
    """[N] token counts -> [N, A] bool, True on the first `count` places of each row."""
    longest = int(lengths_N.max()) if lengths_N.numel() else 0
    return torch.arange(longest, device=lengths_N.device)[None] < lengths_N[:, None]


def pad_rows(values_M: Tensor, lengths_N: Tensor) -> Tensor:
    """[M] flat values -> [N, A] padded with 0. Raises ValueError unless the counts add up to M."""
    if len(values_M) != int(lengths_N.sum()):
        raise ValueError(f"{len(values_M)} values do not fill {int(lengths_N.sum())} places.")
    mask_NA = row_mask(lengths_N)
    values_NA = torch.zeros(mask_NA.shape, dtype=values_M.dtype, device=values_M.device)
    return values_NA.masked_scatter(mask_NA, values_M)


def totals(values_M: Tensor, lengths_N: Tensor) -> Tensor:
    """[M] flat values -> [N] sum of each completion's."""
    return pad_rows(values_M, lengths_N).sum(1)


def row_sums(values_M: Tensor, lengths_N: Tensor) -> Tensor:
    """[M] flat values -> [N] sums of each row's; gradients flow."""
    which_M = torch.repeat_interleave(
        torch.arange(len(lengths_N), device=lengths_N.device), lengths_N
    )
    zeros_N = torch.zeros(len(lengths_N), dtype=values_M.dtype, device=values_M.device)
    return zeros_N.index_add(0, which_M, values_M)


def whiten(
    values_M: Tensor,
    counted_M: Tensor,
    lengths_N: Tensor,
    group_N: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the tokens that are counted (`counted_M` True), 0
    elsewhere; with `group_N`, over those of each group. [M].

    The variance is the biased one. A single entry becomes 0.
    """
    values_NA, counted_NA = pad_rows(values_M, lengths_N), pad_rows(counted_M, lengths_N)
    group_N = torch.zeros_like(lengths_N) if group_N is None else group_N
    for group in torch.unique(group_N):
        rows = group_N == group
        values, counted = values_NA[rows], counted_NA[rows]
        centred = values - _mean(values, counted)
        scale = torch.rsqrt(_mean(centred**2, counted) + eps)
        values_NA[rows] = (centred * scale).masked_fill(~counted, 0.0)
    return values_NA[row_mask(lengths_N)]


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of the values that are counted; 0 where there are none."""
    return values.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)


def loss_weights(lengths_N: Tensor, mode: Aggregation, length: int | None = None) -> Tensor:
    """[M] what each token counts for, so that sum(weights * loss) is the batch's loss however it is
    split.

    token_mean: 1 / M (DAPO). sequence_mean: 1 / (N * own length) (GRPO as published). fixed_length:
    1 / (N * `length`) (Dr. GRPO). N counts completions with at least one token.
    """
    lengths_M = torch.repeat_interleave(lengths_N, lengths_N).float()
    rows = (lengths_N > 0).sum().clamp(min=1)
    if mode == "token_mean":
        return torch.ones_like(lengths_M) / lengths_N.sum().clamp(min=1)
    if mode == "sequence_mean":
        return 1.0 / (rows * lengths_M)
    if mode == "fixed_length" and length:
        return torch.ones_like(lengths_M) / (rows * length)
    raise ValueError(f"Aggregation {mode!r} is not known, or lacks its length.")
