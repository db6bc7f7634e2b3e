"""Policy and value losses of single tokens; the caller gives the weight of each token.

Tensors only. Legend: M policy tokens of the batch, N completions; `lengths_N` are the tokens of
each completion, which lie end to end in M. ratio = p / p_old; advantages and old log-probs are
constants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gearshift.algorithms.normalize import row_sums

ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class PolicyLoss(NamedTuple):
    """[M] losses to be weighted and summed, and [M] metrics to be averaged by the same weights."""

    loss_M: Tensor
    metrics: dict[str, Tensor]


PolicyLossFn = Callable[..., PolicyLoss]
"""(logprobs_M, old_logprobs_M, advantages_M, lengths_N, and the loss's own numbers) -> losses."""


def reinforce(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    lengths_N: Tensor,
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
    lengths_N: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) (Schulman et al. 2017); with
    `dual_clip`, where A < 0 at most -dual_clip * A (Ye et al. 2020).
    """
    log_ratio_M = logprobs_M - old_logprobs_M.detach()
    return _clipped(log_ratio_M, advantages_M.detach(), clip_low, clip_high, dual_clip)


def gspo(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    lengths_N: Tensor,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> PolicyLoss:
    """PPO's clip with one ratio a completion, s = exp(mean of log p - log p_old) (Zheng et al.
    2025).

    In the form for tokens, sg(s) * p / sg(p): with one advantage a completion and each completion's
    tokens weighted the same, value and gradient are those of min(s A, clip(s) A).
    """
    log_ratio_M = logprobs_M - old_logprobs_M.detach()
    mean_N = row_sums(log_ratio_M.detach(), lengths_N) / lengths_N.clamp(min=1)
    log_s_M = torch.repeat_interleave(mean_N, lengths_N) + (logprobs_M - logprobs_M.detach())
    return _clipped(log_s_M, advantages_M.detach(), clip_low, clip_high)


def cispo(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    lengths_N: Tensor,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> PolicyLoss:
    """-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * log p: the weight is clipped, and no
    token loses its gradient (MiniMax-M1, 2025).
    """
    ratio_M = torch.exp(logprobs_M - old_logprobs_M).detach()
    weight_M = ratio_M.clamp(1.0 - clip_low, 1.0 + clip_high)
    metrics = {"ratio": ratio_M, "cispo_clip_ratio": (weight_M != ratio_M).float()}
    return PolicyLoss(-weight_M * advantages_M.detach() * logprobs_M, metrics)


def sapo(
    logprobs_M: Tensor,
    old_logprobs_M: Tensor,
    advantages_M: Tensor,
    lengths_N: Tensor,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> PolicyLoss:
    """-A * sigmoid(tau (ratio - 1)) * 4 / tau, tau by the sign of A (Gao et al. 2025): the gate's
    slope is 1 at ratio 1 and falls off smoothly on both sides.
    """
    advantages_M = advantages_M.detach()
    ratio_M = torch.exp(logprobs_M - old_logprobs_M.detach())
    tau_M = torch.where(advantages_M > 0, tau_positive, tau_negative)
    gate_M = torch.sigmoid(tau_M * (ratio_M - 1.0)) * 4.0 / tau_M
    return PolicyLoss(-advantages_M * gate_M, {"ratio": ratio_M.detach()})


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


def importance_weights(
    old_logprobs_M: Tensor,
    sampler_logprobs_M: Tensor,
    lengths_N: Tensor,
    mode: ImportanceMode,
    cap: float,
) -> Tensor:
    """[M] what each token's loss is multiplied by where the sampler was not the policy before the
    update: another program, or older weights. A constant.

    The ratio p_old / p_sampler of the token, or (`sequence_*`) of its whole completion. Truncated:
    at most `cap` (Espeholt et al. 2018; Yao et al. 2025). Masked: 0 outside [1 / cap, cap].
    """
    log_ratio_M = (old_logprobs_M - sampler_logprobs_M).detach()
    if mode.startswith("sequence"):
        log_ratio_M = torch.repeat_interleave(row_sums(log_ratio_M, lengths_N), lengths_N)
    ratio_M = torch.exp(log_ratio_M)
    if mode.endswith("truncate"):
        return ratio_M.clamp(max=cap)
    return ratio_M.masked_fill((ratio_M > cap) | (ratio_M < 1.0 / cap), 0.0)


def sampler_kl(old_logprobs_M: Tensor, sampler_logprobs_M: Tensor) -> Tensor:
    """[M] the k3 estimate of KL(sampler, policy before the update) in nats: how far the sampler is
    from the policy.
    """
    log_ratio_M = (old_logprobs_M - sampler_logprobs_M).detach()
    return torch.expm1(log_ratio_M) - log_ratio_M


def _clipped(
    log_ratio_M: Tensor,
    advantages_M: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    low, high = 1.0 - clip_low, 1.0 + clip_high
    ratio_M = torch.exp(log_ratio_M)
    clipped_M = ratio_M.clamp(low, high)
    gain_M = torch.minimum(ratio_M * advantages_M, clipped_M * advantages_M)
    below_M = (ratio_M < low) & (advantages_M < 0)
    above_M = (ratio_M > high) & (advantages_M > 0)
    outside_M = below_M | above_M
    if dual_clip is not None:
        floor_M = dual_clip * advantages_M
        outside_M = outside_M | ((advantages_M < 0) & (gain_M < floor_M))
        gain_M = torch.where(advantages_M < 0, torch.maximum(gain_M, floor_M), gain_M)
    metrics = {
        "ratio": ratio_M.detach(),
        "clip_ratio/low_mean": below_M.float(),
        "clip_ratio/high_mean": above_M.float(),
        "clip_ratio/region_mean": outside_M.float(),
        "approx_kl": (torch.expm1(log_ratio_M) - log_ratio_M).detach(),
    }
    return PolicyLoss(-gain_M, metrics)


POLICY_LOSSES: dict[str, PolicyLossFn] = {
    "reinforce": reinforce,
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
}
"""By the name that a recipe gives."""
