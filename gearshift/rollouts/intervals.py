"""How sure a figure is: 95% intervals and tests whose unit is the cluster, not the episode.

Episodes that share a template or a prompt rise and fall together. So a cluster is drawn, or changes
its sign, as a whole. This file works on numbers; it knows no episode and no model.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from gearshift.runtime.seeding import named_seed

Interval = tuple[float, float]
Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 4000
FLIPS = 20000
EXACT = 16
"""Up to this many clusters that change, the paired test tries every pattern of signs."""
FEW = 6
"""With fewer clusters than this, the bootstrap's quantiles are not used."""
_Z = 1.96


def interval(values: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The 95% interval of the values' mean; `clusters` names each value's cluster.

    A rate (all values 0 or 1) has Wilson's interval for an effective number of trials:
    p (1 - p) / (variance of the mean when clusters are resampled), at most the number of values;
    and Student's quantile for the number of clusters. Where every value is a cluster of its own,
    this is Wilson's interval of n trials. Where the resampling gives no information, because all
    clusters have the same mean (0 of k, k of k), each cluster counts as one trial. Any other mean
    has the percentile interval of the cluster bootstrap, from -inf to inf where there is one
    cluster only.
    """
    x_N = np.asarray(values, dtype=np.float64)
    sums_K, sizes_K = by_cluster(x_N, clusters)
    k = len(sums_K)
    if not np.isin(x_N, (0.0, 1.0)).all():
        return bootstrap(sums_K, sizes_K)
    rate = float(x_N.mean())
    if k == len(x_N):
        return wilson(rate, k)
    if rate in (0.0, 1.0):
        return wilson(rate, k)
    if k == 1:
        return 0.0, 1.0
    variance = float(_resampled(sums_K, sizes_K).var()) * k / (k - 1)
    trials = min(len(x_N), rate * (1 - rate) / variance) if variance > 1e-12 else k
    return wilson(rate, max(1.0, trials), student(k - 1))


def interval_of_change(changes: Sequence[float], clusters: Sequence[Hashable]) -> Interval:
    """The 95% interval of the mean change between two policies on the same episodes.

    The percentile interval of the cluster bootstrap. Where every cluster changes alike, which
    resampling cannot widen, and each change is -1, 0 or 1: Bonett and Price's (2012) interval of a
    difference of paired rates, as if each cluster were one episode. It adds one gain and one loss.
    """
    x_N = np.asarray(changes, dtype=np.float64)
    sums_K, sizes_K = by_cluster(x_N, clusters)
    means_K, k = sums_K / sizes_K, len(sums_K)
    if not np.isin(x_N, (-1.0, 0.0, 1.0)).all():
        return bootstrap(sums_K, sizes_K)
    if np.ptp(means_K) > 1e-12:
        low, high = bootstrap(sums_K, sizes_K)
        return max(-1.0, low), min(1.0, high)
    gains, losses = (float((x_N == sign).mean()) * k for sign in (1.0, -1.0))
    gain, loss = (gains + 1) / (k + 2), (losses + 1) / (k + 2)
    half = _Z * math.sqrt((gain + loss - (gain - loss) ** 2) / (k + 2))
    return max(-1.0, gain - loss - half), min(1.0, gain - loss + half)


def bootstrap(sums_K: Floats, sizes_K: Floats) -> Interval:
    """The percentile interval (Efron 1979) of sum / size when clusters are drawn with replacement,
    from a fixed seed. Its tails are moved out by sqrt(k / (k - 1)) and Student's quantile
    (Hesterberg 2015), without which it is too narrow for few clusters. Below `FEW` clusters that is
    still too narrow, because no resample leaves the range of the data. Then the result is Student's
    interval.
    """
    k = len(sums_K)
    if k < 2:
        return -math.inf, math.inf
    if k < FEW:
        mean = sums_K.sum() / sizes_K.sum()
        error = math.sqrt(_resampled(sums_K, sizes_K).var() * k / (k - 1))
        half = student(k - 1) * error
        return float(mean - half), float(mean + half)
    tail = NormalDist().cdf(-math.sqrt(k / (k - 1)) * student(k - 1))
    low, high = np.quantile(_resampled(sums_K, sizes_K), (tail, 1 - tail))
    return float(low), float(high)


def wilson(rate: float, n: float, z: float = _Z) -> Interval:
    """The interval of a rate seen in n trials (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def sign_flip(changes: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Two-sided p of "the policies do equally well": how often the clusters' changes would have a
    sum at least as large if each kept or changed its sign by chance.

    Up to `EXACT` clusters that change, over all patterns of signs: with one episode a cluster and
    changes of -1 and 1 that is McNemar's exact test. Above, over random patterns from a fixed seed,
    the observed one counted among them.
    """
    sums_K, _ = by_cluster(np.asarray(changes, dtype=np.float64), clusters)
    sums_K = sums_K[np.abs(sums_K) > 1e-12]
    k = len(sums_K)
    if k == 0:
        return 1.0
    least = abs(sums_K.sum()) - 1e-9 * np.abs(sums_K).sum()
    if k <= EXACT:
        signs = 2 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1) - 1
        return float((np.abs(signs @ sums_K) >= least).mean())
    random, extreme = _random("sign flips"), 1
    for count in _portions(FLIPS, k):
        signs = 2 * random.integers(2, size=(count, k), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ sums_K) >= least).sum())
    return extreme / (FLIPS + 1)


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's distribution.

    With x = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom - 1).
    """
    angle = np.linspace(0.0, np.pi / 2, 20001)
    height = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(height[1:] + height[:-1])])
    at = float(np.interp(LEVEL * mass[-1], mass, angle))  # the upper half has a share of one half
    return math.sqrt(freedom) * math.tan(at)


def by_cluster(x_N: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """([K] sum, [K] size) of each cluster's values."""
    number: dict[Hashable, int] = {}
    of_N = np.array([number.setdefault(c, len(number)) for c in clusters])
    weights = (x_N, np.ones_like(x_N))
    sums_K, sizes_K = (np.bincount(of_N, weights=w).astype(np.float64) for w in weights)
    return sums_K, sizes_K


def _resampled(sums_K: Floats, sizes_K: Floats) -> Floats:
    """The mean of each of `RESAMPLES` draws of as many clusters as there are."""
    k, random, means = len(sums_K), _random("bootstrap"), []
    for count in _portions(RESAMPLES, k):
        drawn = random.integers(k, size=(count, k))
        means.append(sums_K[drawn].sum(1) / sizes_K[drawn].sum(1))
    return np.concatenate(means)


def _portions(draws: int, k: int) -> Iterator[int]:
    """`draws` in portions of about four million numbers, so that many clusters need no more
    memory than few.
    """
    most = max(1, 2**22 // k)
    for done in range(0, draws, most):
        yield min(most, draws - done)


def _random(name: str) -> np.random.Generator:
    return np.random.default_rng(named_seed(0, f"intervals/{name}"))


def merged(*keys: Sequence[Hashable]) -> list[int]:
    """Each item's cluster, where items are in one cluster if any of the `keys` is equal for both,
    directly or by way of others.
    """
    parent = list(range(len(keys[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for column in keys:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(column):
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(parent))]
