"""Advantages: how rewards become the weight of each token. The trainer calls them by name and knows
no more.

Tensors only. Legend: N completions, A the longest, padded places are 0; `mask_NA` is True on a
prefix of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """What the policy loss weights tokens with, and what a value net should have predicted."""

    advantages_NA: Tensor
    returns_NA: Tensor


class AdvantageFn(Protocol):
    """One signature for all, so that the loop is blind to the method."""

    def __call__(
        self,
        rewards_NA: Tensor,
        mask_NA: Tensor,
        *,
        values_NA: Tensor | None,
        group_N: Tensor,
        gamma: float,
        lam: float,
    ) -> Advantages: ...


def token_rewards(rewards_NA: Tensor, kl_NA: Tensor, beta: float, mask_NA: Tensor) -> Tensor:
    """r_t - beta * KL_t: the KL as a cost of each token (Ziegler et al. 2019; Ouyang et al. 2022).
    [N, A].
    """
    return (rewards_NA - beta * kl_NA).masked_fill(~mask_NA, 0.0)


def returns(rewards_NA: Tensor, mask_NA: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma * G_{t+1}, the discounted reward to go. [N, A]."""
    out_NA = torch.zeros_like(rewards_NA)
    later_N = rewards_NA.new_zeros(len(rewards_NA))
    for t in reversed(range(rewards_NA.shape[1])):
        later_N = (rewards_NA[:, t] + gamma * later_N).masked_fill(~mask_NA[:, t], 0.0)
        out_NA[:, t] = later_N
    return out_NA


def reinforce_baseline(
    rewards_NA: Tensor, values_NA: Tensor, mask_NA: Tensor, gamma: float = 1.0
) -> Advantages:
    """A_t = G_t - V(s_t): REINFORCE with a learned baseline (Williams 1992; Sutton and Barto,
    section 13.4).

    The baseline is a constant to the policy, so the gradient stays unbiased whatever V is.
    """
    returns_NA = returns(rewards_NA, mask_NA, gamma)
    return Advantages((returns_NA - values_NA.detach()).masked_fill(~mask_NA, 0.0), returns_NA)


def gae(
    rewards_NA: Tensor, values_NA: Tensor, mask_NA: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (Schulman et
    al. 2016).

    A row ends at its last token: V beyond it is 0. Returns are A + V.
    """
    values_NA = values_NA.detach().masked_fill(~mask_NA, 0.0)
    advantages_NA = torch.zeros_like(rewards_NA)
    later_N = next_value_N = torch.zeros_like(rewards_NA.sum(1))
    for t in reversed(range(rewards_NA.shape[1])):
        delta_N = rewards_NA[:, t] + gamma * next_value_N - values_NA[:, t]
        later_N = (delta_N + gamma * lam * later_N).masked_fill(~mask_NA[:, t], 0.0)
        next_value_N = values_NA[:, t]
        advantages_NA[:, t] = later_N
    return Advantages(advantages_NA, (advantages_NA + values_NA).masked_fill(~mask_NA, 0.0))


def rloo(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """A_i = r_i - mean of the others of its group (Kool et al. 2019; Ahmadian et al. 2024). [N].

    A completion alone in its group has no baseline: A = r.
    """
    sum_N, size_N, _ = _by_group(rewards_N, group_N)
    others_N = (sum_N - rewards_N) / (size_N - 1).clamp(min=1)
    return (rewards_N - others_N).to(rewards_N.dtype)


def grpo(rewards_N: Tensor, group_N: Tensor, scale: bool = True, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over the group (Shao et al. 2024). [N].

    The standard deviation divides by n - 1, and eps is 1e-4, as in TRL. A completion alone in its
    group gets 0.

    `scale=False` keeps r_i - mean, which does not favour easy and hard prompts (Dr. GRPO, Liu et
    al. 2025).
    """
    sum_N, size_N, index_N = _by_group(rewards_N, group_N)
    centred_N = rewards_N - sum_N / size_N
    if scale:
        squares_N = torch.zeros_like(sum_N).index_add(0, index_N, centred_N**2)[index_N]
        centred_N = centred_N / (torch.sqrt(squares_N / (size_N - 1).clamp(min=1)) + eps)
    return centred_N.to(rewards_N.dtype)


def broadcast(advantages_N: Tensor, mask_NA: Tensor) -> Tensor:
    """Every token of a completion gets the completion's advantage. [N, A]."""
    return advantages_N[:, None] * mask_NA


def _by_group(rewards_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and size of each completion's group, and the group's index.

    In float64, where the mean of equal float32 rewards is that reward to the last bit: a tie then
    has advantage 0, not a rounding error that `grpo` blows up, and its group can be left out.
    """
    _, index_N = torch.unique(group_N, return_inverse=True)
    zeros_N = torch.zeros_like(rewards_N, dtype=torch.float64)
    sum_N = zeros_N.index_add(0, index_N, rewards_N.double())[index_N]
    size_N = zeros_N.index_add(0, index_N, torch.ones_like(zeros_N))[index_N]
    return sum_N, size_N, index_N


def _reinforce(
    rewards_NA: Tensor,
    mask_NA: Tensor,
    *,
    values_NA: Tensor | None,
    group_N: Tensor,
    gamma: float,
    lam: float,
) -> Advantages:
    if values_NA is None:
        raise ValueError("REINFORCE with a baseline needs values.")
    return reinforce_baseline(rewards_NA, values_NA, mask_NA, gamma)


def _gae(
    rewards_NA: Tensor,
    mask_NA: Tensor,
    *,
    values_NA: Tensor | None,
    group_N: Tensor,
    gamma: float,
    lam: float,
) -> Advantages:
    if values_NA is None:
        raise ValueError("GAE needs values.")
    return gae(rewards_NA, values_NA, mask_NA, gamma, lam)


def _of_sequences(score: Callable[[Tensor, Tensor], Tensor]) -> AdvantageFn:
    def fn(
        rewards_NA: Tensor,
        mask_NA: Tensor,
        *,
        values_NA: Tensor | None,
        group_N: Tensor,
        gamma: float,
        lam: float,
    ) -> Advantages:
        advantages_N = score(rewards_NA.masked_fill(~mask_NA, 0.0).sum(1), group_N)
        return Advantages(broadcast(advantages_N, mask_NA), returns(rewards_NA, mask_NA, gamma))

    return fn


ADVANTAGES: dict[str, AdvantageFn] = {
    "reinforce": _reinforce,
    "gae": _gae,
    "rloo": _of_sequences(rloo),
    "grpo": _of_sequences(grpo),
    "dr_grpo": _of_sequences(lambda rewards_N, group_N: grpo(rewards_N, group_N, scale=False)),
}
"""By the name that a recipe gives."""

NEEDS_VALUES = frozenset({"reinforce", "gae"})
"""Those that a value net must feed."""
