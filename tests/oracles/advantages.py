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


def grpo_turns(rewards: Rows, given: list[list[bool]], groups: list[int]) -> Rows:
    """Each turn's reward, the sum up to where it is given, normalised over its group's turns; a
    token gets the sum of those that end at it or after it.
    """
    turns: list[dict[int, float]] = []
    for row, ends in zip(rewards, given, strict=True):
        found, begun = {}, 0
        for t in [t for t, end in enumerate(ends) if end]:
            found[t], begun = sum(row[begun : t + 1]), t + 1
        turns.append(found)
    out = []
    for row, own, g in zip(rewards, turns, groups, strict=True):
        of_group = [r for x, h in zip(turns, groups, strict=True) if h == g for r in x.values()]
        mean = statistics.fmean(of_group) if of_group else 0.0
        spread = statistics.stdev(of_group) + 1e-4 if len(of_group) > 1 else float("inf")
        out.append(
            [sum((r - mean) / spread for t, r in own.items() if t >= i) for i in range(len(row))]
        )
    return out


def opo(rewards: list[float], groups: list[int], lengths: list[int]) -> list[float]:
    """r_i less the length-weighted mean reward of its group."""
    out = []
    for r, g in zip(rewards, groups, strict=True):
        members = [j for j, h in enumerate(groups) if h == g]
        weighted = sum(lengths[j] * rewards[j] for j in members)
        out.append(r - weighted / sum(lengths[j] for j in members))
    return out


def best_of_n(rewards: list[float], groups: list[int]) -> list[float]:
    """The group's size for its first best, 0 for others."""
    out = []
    for i, g in enumerate(groups):
        members = [j for j, h in enumerate(groups) if h == g]
        best = next(j for j in members if rewards[j] == max(rewards[k] for k in members))
        out.append(float(len(members)) if i == best else 0.0)
    return out
