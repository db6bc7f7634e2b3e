"""How far people agree: percent agreement, Cohen's kappa, Krippendorff's alpha and its interval. It
knows no HTTP and no store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import numpy as np
import numpy.typing as npt

Value = int | str
Array = npt.NDArray[np.float64]
_RESAMPLES = 1000


def percent_agreement(units: Sequence[Sequence[Value]]) -> float | None:
    """The share of pairs of labels of one item that are equal, as a mean over the items. `units`:
    the labels of each item. None where no item has two.
    """
    shares = [fmean(a == b for a, b in combinations(unit, 2)) for unit in units if len(unit) > 1]
    return fmean(shares) if shares else None


def cohen_kappa(pairs: Sequence[tuple[Value, Value]]) -> float | None:
    """Cohen's kappa (1960) of two people: (p_o - p_e) / (1 - p_e), where p_o is the share of items
    on which they agree, and p_e what chance would give. `pairs`: both labels of each item. None
    where chance alone gives full agreement.
    """
    n = len(pairs)
    one, other = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(one[value] * other[value] for value in one)  # p_e n^2, a whole number
    if not n or expected == n * n:
        return None
    observed = sum(a == b for a, b in pairs) * n
    return (observed - expected) / (n * n - expected)


def krippendorff_alpha(units: Sequence[Sequence[Value]], ordinal: bool = False) -> float | None:
    """Krippendorff's alpha (2011): 1 - D_o / D_e, the observed over the expected disagreement.

    `units`: the labels of each item, by any people; an item with one label counts for nothing.
    `ordinal`: values are ranks, and far ones disagree more. None where all labels are the same.
    """
    coincidences = _coincidences(units)
    return _number(_alpha(coincidences.sum(0, keepdims=True), ordinal)[0])


def alpha_interval(
    units: Sequence[Sequence[Value]], ordinal: bool = False, seed: int = 0
) -> tuple[float, float] | None:
    """The 95% interval of alpha: the bootstrap over items. None where it has no value."""
    coincidences = _coincidences(units)
    n = len(coincidences)
    if not n:
        return None
    draws = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=_RESAMPLES)
    found = _alpha(np.tensordot(draws.astype(np.float64), coincidences, 1), ordinal)
    found = found[np.isfinite(found)]  # a draw of equal labels has no alpha
    if not len(found):
        return None
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def _coincidences(units: Sequence[Sequence[Value]]) -> Array:
    """[items, values, values]: how often two labels of an item have these values, each label
    counted once.
    """
    used = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in used for value in unit}, key=lambda v: (str(type(v)), v))
    found = np.zeros((len(used), len(values), len(values)))
    for i, unit in enumerate(used):
        counts = np.array([unit.count(value) for value in values], dtype=np.float64)
        found[i] = (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    return found


def _alpha(coincidences: Array, ordinal: bool) -> Array:
    """Alpha of each of several matrices [R, values, values]; NaN where all labels are the same."""
    totals = coincidences.sum(2)
    n = totals.sum(1)
    if ordinal:
        # Ranks between two values, half of either included.
        ranks = np.cumsum(totals, 1) - totals / 2
        far = (ranks[:, :, None] - ranks[:, None, :]) ** 2
    else:
        far = np.broadcast_to(1 - np.eye(totals.shape[1]), coincidences.shape)
    observed = (coincidences * far).sum((1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * far).sum((1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = 1 - (n - 1) * observed / expected
    return np.where(expected > 0, found, np.nan)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
