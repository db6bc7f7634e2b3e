"""Losses of one token, pair or completion, case by case in Python floats."""

import math


def ppo(lp: float, old: float, a: float, low: float, high: float) -> tuple[float, float]:
    """(loss, d loss / d log p) of one token (Schulman et al. 2017, figure 1)."""
    ratio = math.exp(lp - old)
    if a > 0 and ratio > 1 + high:
        return -(1 + high) * a, 0.0
    if a < 0 and ratio < 1 - low:
        return -(1 - low) * a, 0.0
    return -ratio * a, -ratio * a


def dual_clip(lp: float, old: float, a: float, low: float, high: float, c: float) -> tuple:
    """PPO's, but a negative advantage costs at most c times itself (Ye et al. 2020)."""
    loss, slope = ppo(lp, old, a, low, high)
    return (-c * a, 0.0) if a < 0 and loss > -c * a else (loss, slope)


def cispo(lp: float, old: float, a: float, low: float, high: float) -> tuple[float, float]:
    weight = min(max(math.exp(lp - old), 1 - low), 1 + high)
    return -weight * a * lp, -weight * a


def sapo(lp: float, old: float, a: float, positive: float, negative: float) -> tuple:
    tau = positive if a > 0 else negative
    ratio = math.exp(lp - old)
    s = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return -a * s * 4 / tau, -a * 4 * s * (1 - s) * ratio


def gspo(
    lps: list[float], olds: list[float], a: float, low: float, high: float
) -> tuple[float, list[float]]:
    """A completion's loss -min(s A, clip(s) A), and its gradient by each token's log p."""
    n = len(lps)
    s = math.exp(sum(x - y for x, y in zip(lps, olds, strict=True)) / n)
    if (a > 0 and s > 1 + high) or (a < 0 and s < 1 - low):
        return -min(max(s, 1 - low), 1 + high) * a, [0.0] * n
    return -s * a, [-s * a / n] * n


def importance(
    olds: list[list[float]], samplers: list[list[float]], mode: str, cap: float
) -> list[float]:
    out = []
    for old, sampler in zip(olds, samplers, strict=True):
        ratios = [math.exp(x - y) for x, y in zip(old, sampler, strict=True)]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios)] * len(ratios)
        for ratio in ratios:
            if mode.endswith("truncate"):
                out.append(min(ratio, cap))
            else:
                out.append(ratio if 1 / cap <= ratio <= cap else 0.0)
    return out


def _log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def dpo(c: float, r: float, beta: float, e: float) -> float:
    z = beta * (c - r)
    return -(1 - e) * _log_sigmoid(z) - e * _log_sigmoid(-z)


def ipo(c: float, r: float, beta: float) -> float:
    return (c - r - 1 / (2 * beta)) ** 2


def kto(ratio: float, good: bool, z0: float, beta: float, wd: float, wu: float) -> float:
    sigmoid = 1 / (1 + math.exp(-beta * (ratio - z0) * (1 if good else -1)))
    return (wd if good else wu) * (1 - sigmoid)


def orpo(c: float, r: float, weight: float) -> float:
    odds = [math.exp(x) / (1 - math.exp(x)) for x in (c, r)]
    return -weight * _log_sigmoid(math.log(odds[0] / odds[1]))


def simpo(c: float, r: float, beta: float, margin: float) -> float:
    return -_log_sigmoid(beta * (c - r) - margin)


def step(logit: float, right: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -math.log(p if right else 1 - p)


def slope(f, x: float, h: float = 1e-5) -> float:  # type: ignore[no-untyped-def]
    """df/dx by central differences."""
    return (f(x + h) - f(x - h)) / (2 * h)
