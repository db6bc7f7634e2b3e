"""Intervals and paired tests the slow way: clusters as lists, one draw, one pattern at a time."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Hashable, Sequence
from statistics import fmean


def grouped(values: Sequence[float], clusters: Sequence[Hashable]) -> list[list[float]]:
    """The values of each cluster."""
    names = list(dict.fromkeys(clusters))
    return [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in names]


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], draws: int = 4000
) -> list[float]:
    """Sorted means of `draws` samples of whole clusters."""
    groups, rng = grouped(values, clusters), random.Random(1)
    return sorted(
        fmean(v for group in rng.choices(groups, k=len(groups)) for v in group)
        for _ in range(draws)
    )


def sign_flip(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Share of all patterns of signs whose sum is as far from 0 as the one seen."""
    sums = [math.fsum(group) for group in grouped(values, clusters)]
    seen = abs(math.fsum(sums)) - 1e-9
    patterns = list(itertools.product((-1, 1), repeat=len(sums)))
    far = sum(abs(math.fsum(s * x for s, x in zip(p, sums, strict=True))) >= seen for p in patterns)
    return far / len(patterns)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of McNemar's test: a fair coin for each row that changed."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)
