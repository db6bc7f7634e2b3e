"""Advantages: how rewards become the weight of each token. The trainer calls them by name and knows
no more.

Tensors only. Legend: N completions, A the longest, padded places are 0; `mask_NA` is True on a
prefix of each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """What the policy loss weights tokens with."""

    advantages_NA: Tensor
    returns_NA: Tensor | None = None
    """What a value net should have predicted; None where the advantage has no use for one."""
    baseline: float | None = None
    """The moving average of returns, this rollout's among them, where the advantage keeps one."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """What an advantage function may look at."""

    rewards_NA: Tensor
    """At the tokens that earn them."""
    mask_NA: Tensor
    group_N: Tensor
    """Completions of one prompt have the same number."""
    values_NA: Tensor | None = None
    """A value net's, where there is one."""
    baseline: float | None = None
    """The moving average of returns so far; None before the first."""
    greedy_N: Tensor | None = None
    """The return of the greedy completion of each one's prompt, where it was sampled."""
    given_NA: Tensor | None = None
    """True where a reward was given, one of 0 too; None: where it is not 0."""


AdvantageFn = Callable[..., Advantages]
"""(rollout, and the advantage's own numbers) -> advantages; the loop is blind to the method. Raises
ValueError where what it needs is missing."""


def returns(rewards_NA: Tensor, mask_NA: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma * G_{t+1}, the discounted reward to go. [N, A]."""
    out_NA = torch.zeros_like(rewards_NA)
    later_N = rewards_NA.new_zeros(len(rewards_NA))
    for t in reversed(range(rewards_NA.shape[1])):
        later_N = (rewards_NA[:, t] + gamma * later_N).masked_fill(~mask_NA[:, t], 0.0)
        out_NA[:, t] = later_N
    return out_NA


def value_baseline(
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


def grpo_turns(
    rewards_NA: Tensor,
    mask_NA: Tensor,
    group_N: Tensor,
    given_NA: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """A_t = sum over turns that end at t or later of (r - mean) / (std + eps), mean and std over
    all turns of the group (process supervision, Shao et al. 2024). [N, A].

    A turn ends where `given_NA` is True (None: where a reward is not 0); r is the sum of the
    rewards since the turn before, a KL at each token among them. A token is credited with what came
    after it.
    """
    given_NA = (rewards_NA != 0 if given_NA is None else given_NA) & mask_NA
    turn_NA = given_NA.cumsum(1) - given_NA.long()
    sums_NA = torch.zeros(len(group_N), mask_NA.shape[1] + 1).double().to(rewards_NA.device)
    sums_NA = sums_NA.scatter_add(1, turn_NA, rewards_NA.masked_fill(~mask_NA, 0.0).double())
    earned_NA = sums_NA.gather(1, turn_NA)
    scaled_NA = torch.zeros_like(rewards_NA)
    for group in torch.unique(group_N):
        here_NA = given_NA & (group_N == group)[:, None]
        values = earned_NA[here_NA]
        if len(values) > 1:
            scaled_NA[here_NA] = ((values - values.mean()) / (values.std() + eps)).to(
                rewards_NA.dtype
            )
    return returns(scaled_NA, mask_NA)


def opo(rewards_N: Tensor, group_N: Tensor, lengths_N: Tensor) -> Tensor:
    """A_i = r_i - sum(l_j r_j) / sum(l_j) over the group, l its lengths: the baseline of least
    variance, if a gradient's square grows as the length (Hao et al. 2025). [N].
    """
    index_N = _by_group(rewards_N, group_N)[2]
    zeros_N, lengths_N = (
        torch.zeros(len(rewards_N)).double().to(rewards_N.device),
        lengths_N.double(),
    )
    weighted_N = zeros_N.index_add(0, index_N, lengths_N * rewards_N.double())[index_N]
    total_N = zeros_N.index_add(0, index_N, lengths_N)[index_N].clamp(min=1)
    return (rewards_N - weighted_N / total_N).to(rewards_N.dtype)


def best_of_n(rewards_N: Tensor, group_N: Tensor) -> Tensor:
    """A_i = size of the group for its best completion (the first of equals), 0 for the rest: with
    -A log p, supervised tuning on the best of n (RAFT, Dong et al. 2023). [N].
    """
    out_N = torch.zeros_like(rewards_N)
    for group in torch.unique(group_N):
        members = torch.nonzero(group_N == group)[:, 0]
        out_N[members[rewards_N[members].argmax()]] = len(members)
    return out_N


def moving_average(old: float | None, new: float, decay: float) -> float:
    """decay * old + (1 - decay) * new; `new` where there is no old."""
    return new if old is None else decay * old + (1.0 - decay) * new


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


def _reward_less(baseline_N: Tensor | float, rollout: Rollout, gamma: float) -> Advantages:
    """G_t less a baseline for each completion."""
    returns_NA = returns(rollout.rewards_NA, rollout.mask_NA, gamma)
    baseline = baseline_N[:, None] if isinstance(baseline_N, Tensor) else baseline_N
    return Advantages((returns_NA - baseline).masked_fill(~rollout.mask_NA, 0.0))


def _none(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    return _reward_less(0.0, rollout, gamma)


def _value_baseline(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    values_NA = _needed(rollout.values_NA, "value_baseline", "values")
    return value_baseline(rollout.rewards_NA, values_NA, rollout.mask_NA, gamma)


def _gae(rollout: Rollout, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    values_NA = _needed(rollout.values_NA, "gae", "values")
    return gae(rollout.rewards_NA, values_NA, rollout.mask_NA, gamma, lam)


def _remax(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    """r - r of the greedy completion (Li et al. 2023)."""
    return _reward_less(_needed(rollout.greedy_N, "remax", "greedy returns"), rollout, gamma)


def _moving_average(rollout: Rollout, gamma: float = 1.0, decay: float = 0.9) -> Advantages:
    mean = float(rollout.rewards_NA.sum(1).mean())
    after = moving_average(rollout.baseline, mean, decay)
    return _reward_less(rollout.baseline or 0.0, rollout, gamma)._replace(baseline=after)


def _needed(value: Tensor | None, name: str, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"The advantage {name} needs {what}.")
    return value


def _of_sequences(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AdvantageFn:
    """An advantage for a whole completion, from its summed rewards, group and length."""

    def fn(rollout: Rollout) -> Advantages:
        rewards_NA, mask_NA = rollout.rewards_NA, rollout.mask_NA
        total_N = rewards_NA.masked_fill(~mask_NA, 0.0).sum(1)
        advantages_N = score(total_N, rollout.group_N, mask_NA.sum(1))
        return Advantages(broadcast(advantages_N, mask_NA))

    return fn


def _grpo_turns(rollout: Rollout) -> Advantages:
    return Advantages(
        grpo_turns(rollout.rewards_NA, rollout.mask_NA, rollout.group_N, rollout.given_NA)
    )


ADVANTAGES: dict[str, AdvantageFn] = {
    "none": _none,
    "value_baseline": _value_baseline,
    "moving_average": _moving_average,
    "gae": _gae,
    "rloo": _of_sequences(lambda rewards_N, group_N, _: rloo(rewards_N, group_N)),
    "grpo": _of_sequences(lambda rewards_N, group_N, _: grpo(rewards_N, group_N)),
    "dr_grpo": _of_sequences(lambda rewards_N, group_N, _: grpo(rewards_N, group_N, scale=False)),
    "grpo_turns": _grpo_turns,
    "remax": _remax,
    "opo": _of_sequences(opo),
    "best_of_n": _of_sequences(lambda rewards_N, group_N, _: best_of_n(rewards_N, group_N)),
}
"""By the name that a recipe gives."""

NEEDS_VALUES = frozenset({"value_baseline", "gae"})
"""Those that a value net must feed."""
NEEDS_GREEDY = frozenset({"remax"})
"""Those that need a greedy completion of each prompt."""
NEEDS_GROUPS = frozenset({"rloo", "grpo", "dr_grpo", "grpo_turns", "opo", "best_of_n"})
"""Those that compare the completions of a prompt: one alone tells them nothing."""
