"""Policy and value losses of single tokens; what each token counts for is the caller's weight.

Tensors only. Legend: M policy tokens of the batch.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """[M] losses to be weighted and summed, and [M] figures to be averaged by the same weights."""

    loss_M: Tensor
    metrics: dict[str, Tensor]


class PolicyLossFn(Protocol):
    """One signature for all. Advantages and old log-probs are constants."""

    def __call__(
        self,
        logprobs_M: Tensor,
        old_logprobs_M: Tensor,
        advantages_M: Tensor,
        *,
        clip_low: float,
        clip_high: float,
    ) -> PolicyLoss: ...


def reinforce(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """-A * log p: its gradient is the policy gradient (Williams 1992). No ratio, so one update a
    rollout is meant.
    """
    ratio_M = torch.exp(logprobs_M - old_logprobs_M).detach()
    return PolicyLoss(-advantages_M.detach() * logprobs_M, {"ratio": ratio_M})


def ppo_clip(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> PolicyLoss:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = p / p_old (Schulman et
    al. 2017).
    """
    advantages_M = advantages_M.detach()
    log_ratio_M = logprobs_M - old_logprobs_M.detach()
    ratio_M = torch.exp(log_ratio_M)
    clipped_M = ratio_M.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_M = -torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    outside_M = ((ratio_M < 1.0 - clip_low) & (advantages_M < 0)) | (
        (ratio_M > 1.0 + clip_high) & (advantages_M > 0)
    )
    metrics = {
        "ratio": ratio_M.detach(),
        "clip_fraction": outside_M.float(),
        "approx_kl": (torch.expm1(log_ratio_M) - log_ratio_M).detach(),
    }
    return PolicyLoss(loss_M, metrics)


def value_loss(
    values_M: Tensor,
    returns_M: Tensor,
    old_values_M: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """[M] (V - R)^2 / 2; with `clip`, the greater of that and the same with V kept within `clip` of
    the old value (Schulman et al. 2017's code). Returns and old values are constants.

    Raises ValueError where a clip has no old values.
    """
    returns_M = returns_M.detach()
    loss_M = 0.5 * (values_M - returns_M) ** 2
    if clip is None:
        return loss_M
    if old_values_M is None:
        raise ValueError("A value clip needs the old values.")
    old_values_M = old_values_M.detach()
    near_M = old_values_M + (values_M - old_values_M).clamp(-clip, clip)
    return torch.maximum(loss_M, 0.5 * (near_M - returns_M) ** 2)


POLICY_LOSSES: dict[str, PolicyLossFn] = {"reinforce": reinforce, "ppo_clip": ppo_clip}
"""By the name that a recipe gives."""
