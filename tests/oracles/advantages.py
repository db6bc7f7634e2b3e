"""Advantages by Python loops over lists of floats, one completion at a time, each from its
definition.
"""

import statistics

Rows = list[list[float]]


def returns(rewards: Rows, gamma: float) -> Rows:
    """G_t = sum_k gamma^k r_{t+k}, written out."""
    return [
        [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]
        for row in rewards
    ]


def gae(rewards: Rows, values: Rows, gamma: float, lam: float) -> Rows:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, written out; V after the last token is 0."""
    out = []
    for r, v in zip(rewards, values, strict=True):
        after = [*v[1:], 0.0]
        delta = [r[t] + gamma * after[t] - v[t] for t in range(len(r))]
        out.append(
            [
                sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r)))
                for t in range(len(r))
            ]
        )
    return out


def rloo(rewards: list[float], groups: list[int]) -> list[float]:
    """r_i minus the mean of the others of its group."""
    out = []
    for i, (r, g) in enumerate(zip(rewards, groups, strict=True)):
        others = [x for j, x in enumerate(rewards) if groups[j] == g and j != i]
        out.append(r - (statistics.fmean(others) if others else 0.0))
    return out


def grpo(rewards: list[float], groups: list[int], scale: bool) -> list[float]:
    """(r_i - mean) / (sample standard deviation + 1e-4)."""
    out = []
    for r, g in zip(rewards, groups, strict=True):
        group = [x for x, h in zip(rewards, groups, strict=True) if h == g]
        spread = statistics.stdev(group) if len(group) > 1 else 0.0
        out.append((r - statistics.fmean(group)) / (spread + 1e-4 if scale else 1.0))
    return out
