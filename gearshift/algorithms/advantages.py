"""Advantages turn rewards into a weight for each token. The trainer calls them by name.

Tensors only: [M] tokens that the policy wrote, completion after completion, and [N] completions;
`lengths_N` are the tokens of each completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gearshift.algorithms.normalize import pad_rows, row_mask, totals


class Advantages(NamedTuple):
    """The weight of each token in the policy loss."""

    advantages_M: Tensor
    returns_M: Tensor | None = None
    """The targets of the value net; None if the advantage uses no value net."""
    baseline: float | None = None
    """The moving average of returns including this rollout's, if the advantage keeps one."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """The inputs of an advantage function."""

    rewards_M: Tensor
    """The rewards, at the tokens that earn them."""
    lengths_N: Tensor
    group_N: Tensor
    """Completions of one prompt have the same number."""
    values_M: Tensor | None = None
    """The values of a value net, if there is one."""
    baseline: float | None = None
    """The moving average of returns so far; None before the first."""
    greedy_N: Tensor | None = None
    """The return of the greedy completion of each completion's prompt, if it was sampled."""
    given_M: Tensor | None = None
    """True where a reward was given, even a reward of 0. None: where it is not 0."""


AdvantageFn = Callable[..., Advantages]
"""(rollout, and the advantage's own numbers) -> advantages. The loop does not know the method.
Raises ValueError if an input that it needs is missing.
"""


def returns(rewards_M: Tensor, lengths_N: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma * G_{t+1}, the discounted reward to go inside each completion. [M]."""
    rewards_NA = pad_rows(rewards_M, lengths_N)
    returns_NA = torch.zeros_like(rewards_NA)
    later_N = rewards_M.new_zeros(len(lengths_N))
    for t in reversed(range(rewards_NA.shape[1])):
        later_N = rewards_NA[:, t] + gamma * later_N  # 0 after a completion's end
        returns_NA[:, t] = later_N
    return returns_NA[row_mask(lengths_N)]


def value_baseline(
    rewards_M: Tensor, values_M: Tensor, lengths_N: Tensor, gamma: float = 1.0
) -> Advantages:
    """A_t = G_t - V(s_t): REINFORCE with a learned baseline (Williams 1992; Sutton and Barto,
    section 13.4).

    The baseline is a constant to the policy, so the gradient stays unbiased whatever V is.
    """
    returns_M = returns(rewards_M, lengths_N, gamma)
    return Advantages(returns_M - values_M.detach(), returns_M)


def gae(
    rewards_M: Tensor, values_M: Tensor, lengths_N: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (Schulman et
    al. 2016).

    A completion ends at its last token: V beyond it is 0. Returns are A + V.
    """
    values_M = values_M.detach()
    next_M = torch.cat([values_M[1:], values_M.new_zeros(1)])[: len(values_M)]
    ends_N = lengths_N.cumsum(0) - 1
    next_M[ends_N[lengths_N > 0]] = 0.0
    advantages_M = returns(rewards_M + gamma * next_M - values_M, lengths_N, gamma * lam)
    return Advantages(advantages_M, advantages_M + values_M)


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
    rewards_M: Tensor,
    lengths_N: Tensor,
    group_N: Tensor,
    given_M: Tensor | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """A_t = sum over turns that end at t or later of (r - mean) / (std + eps), mean and std over
    all turns of the group (process supervision, Shao et al. 2024). [M].

    A turn ends where `given_M` is True (None: where a reward is not 0); r is the sum of the rewards
    since the turn before, a KL at each token among them. A token is credited with what came after
    it.
    """
    given_M = rewards_M != 0 if given_M is None else given_M
    row_M = torch.repeat_interleave(torch.arange(len(lengths_N)).to(lengths_N.device), lengths_N)
    turn_M = given_M.cumsum(0) - given_M.long() + row_M  # a completion begins another turn
    sums = rewards_M.new_zeros(len(rewards_M) + len(lengths_N)).double()
    earned_M = sums.index_add(0, turn_M, rewards_M.double())[turn_M]
    scaled_M, group_M = torch.zeros_like(rewards_M), group_N[row_M]
    for group in torch.unique(group_N):
        here_M = given_M & (group_M == group)
        values = earned_M[here_M]
        if len(values) > 1:
            scaled = (values - values.mean()) / (values.std() + eps)
            scaled_M[here_M] = scaled.to(rewards_M.dtype)
    return returns(scaled_M, lengths_N)


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
    returns_M = returns(rollout.rewards_M, rollout.lengths_N, gamma)
    if isinstance(baseline_N, Tensor):
        return Advantages(returns_M - torch.repeat_interleave(baseline_N, rollout.lengths_N))
    return Advantages(returns_M - baseline_N)


def _none(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    return _reward_less(0.0, rollout, gamma)


def _value_baseline(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    values_M = _needed(rollout.values_M, "value_baseline", "values")
    return value_baseline(rollout.rewards_M, values_M, rollout.lengths_N, gamma)


def _gae(rollout: Rollout, gamma: float = 1.0, lam: float = 0.95) -> Advantages:
    values_M = _needed(rollout.values_M, "gae", "values")
    return gae(rollout.rewards_M, values_M, rollout.lengths_N, gamma, lam)


def _remax(rollout: Rollout, gamma: float = 1.0) -> Advantages:
    """r - r of the greedy completion (Li et al. 2023)."""
    return _reward_less(_needed(rollout.greedy_N, "remax", "greedy returns"), rollout, gamma)


def _moving_average(rollout: Rollout, gamma: float = 1.0, decay: float = 0.9) -> Advantages:
    mean = float(totals(rollout.rewards_M, rollout.lengths_N).mean())
    after = moving_average(rollout.baseline, mean, decay)
    return _reward_less(rollout.baseline or 0.0, rollout, gamma)._replace(baseline=after)


def _needed(value: Tensor | None, name: str, what: str) -> Tensor:
    if value is None:
        raise ValueError(f"The advantage {name} needs {what}.")
    return value


def _of_sequences(score: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AdvantageFn:
    """An advantage for a whole completion, from its summed rewards, group and length."""

    def fn(rollout: Rollout) -> Advantages:
        total_N = totals(rollout.rewards_M, rollout.lengths_N)
        advantages_N = score(total_N, rollout.group_N, rollout.lengths_N)
        return Advantages(torch.repeat_interleave(advantages_N, rollout.lengths_N))

    return fn


def _grpo_turns(rollout: Rollout) -> Advantages:
    return Advantages(
        grpo_turns(rollout.rewards_M, rollout.lengths_N, rollout.group_N, rollout.given_M)
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
"""Advantages that need a value net."""
NEEDS_GREEDY = frozenset({"remax"})
"""Advantages that need a greedy completion of each prompt."""
NEEDS_GROUPS = frozenset({"rloo", "grpo", "dr_grpo", "grpo_turns", "opo", "best_of_n"})
"""Advantages that compare the completions of a prompt: one alone has no baseline."""
