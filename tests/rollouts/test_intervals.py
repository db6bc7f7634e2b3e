"""Intervals are as wide as the number of clusters allows, and few changes prove nothing."""

from __future__ import annotations

import math
import random
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.rollouts import intervals as t
from tests.oracles import intervals as slow


def test_wilson() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert t.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert t.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert t.wilson(1, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_student() -> None:
    # Tables of Student's distribution, two-sided 5%.
    known = {1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 1000: 1.962}
    for freedom, quantile in known.items():
        assert t.student(freedom) == pytest.approx(quantile, abs=6e-4)


def test_where_every_row_is_a_cluster_a_rate_has_wilsons_interval() -> None:
    values = [1.0] * 7 + [0.0] * 13
    assert t.interval(values, range(20)) == t.wilson(0.35, 20)
    assert t.interval([0.0] * 20, range(20)) == t.wilson(0, 20)


def test_a_mean_has_the_interval_that_theory_gives_it() -> None:
    values = [random.Random(i).gauss(3, 2) for i in range(400)]
    low, high = t.interval(values, range(400))
    mean, half = fmean(values), 1.96 * 2 / math.sqrt(400)
    assert low == pytest.approx(mean - half, abs=0.06)
    assert high == pytest.approx(mean + half, abs=0.06)
    assert t.interval(values, range(400)) == (low, high), "the same figures, the same interval"


def test_a_template_answered_alike_many_times_is_one_problem() -> None:
    rng = random.Random(0)
    rates = [float(rng.random() < 0.5) for _ in range(76)]
    once = t.interval(rates, range(76))
    values = [rate for rate in rates for _ in range(4)]
    low, high = t.interval(values, [i for i in range(76) for _ in range(4)])
    assert high - low == pytest.approx(once[1] - once[0], abs=0.02)
    naive = t.interval(values, range(len(values)))
    assert high - low > 1.8 * (naive[1] - naive[0])


@pytest.mark.parametrize("seed", range(4))
def test_rates_and_changes_agree_with_the_bootstrap_of_whole_clusters(seed: int) -> None:
    rng = random.Random(seed)
    clusters = [c for c in range(70) for _ in range(rng.randint(1, 8))]
    chance = [rng.random() for _ in range(70)]
    values = [float(rng.random() < chance[c]) for c in clusters]
    changes = [float(rng.choice((0, 0, 0, 1, 1, -1))) if chance[c] < 0.6 else 0.0 for c in clusters]
    for fast, seen in (
        (t.interval(values, clusters), values),
        (t.interval_of_change(changes, clusters), changes),
    ):
        draws = slow.cluster_bootstrap(seen, clusters)
        assert fast[0] == pytest.approx(draws[int(0.0235 * len(draws))], abs=0.012)
        assert fast[1] == pytest.approx(draws[int(0.9765 * len(draws))], abs=0.012)


def test_all_alike_is_no_certainty() -> None:
    eleven = [i % 11 for i in range(256)]
    assert t.interval([1.0] * 256, eleven) == t.wilson(1.0, 11)
    assert t.interval([0.0] * 256, eleven) == t.wilson(0.0, 11)
    low, high = t.interval([0.0, 1.0] * 5, [i // 2 for i in range(10)])
    assert low < 0.2 and high > 0.8
    # Won from all of eleven, lost from all of eleven before: not [+1, +1].
    low, high = t.interval_of_change([1.0] * 256, eleven)
    assert (low, high) == (pytest.approx(0.556, abs=1e-3), 1.0)
    low, high = t.interval_of_change([0.0] * 20, range(20))
    assert low == -high < -0.1


def test_one_cluster_tells_nothing_of_others() -> None:
    assert t.interval([0.3, 0.4], ["a", "a"]) == (-math.inf, math.inf)
    assert t.interval_of_change([0.3, 0.4], ["a", "a"]) == (-math.inf, math.inf)
    assert t.interval([0.0, 1.0, 1.0], ["a"] * 3) == (0.0, 1.0)
    assert t.interval([1.0] * 9, ["a"] * 9) == t.wilson(1.0, 1)
    low, high = t.interval_of_change([1.0] * 9, ["a"] * 9)
    assert low < 0 < high


def test_intervals_of_few_clusters_hold_the_truth_often_enough() -> None:
    """With eight clusters, each with its own rate, 95% of the intervals should contain the mean."""
    rng, held = np.random.default_rng(0), 0
    clusters = np.repeat(np.arange(8), 6).tolist()
    for _ in range(150):
        rates = np.repeat(rng.beta(1.5, 1.5, size=8), 6)
        low, high = t.interval((rng.random(48) < rates).astype(float).tolist(), clusters)
        held += low <= 0.5 <= high
    assert held / 150 > 0.91


@pytest.mark.parametrize("k", [2, 3, 5])
def test_means_of_a_handful_of_clusters_hold_the_truth_often_enough(k: int) -> None:
    """No resample leaves the range of what was seen, and so few clusters seldom span the truth."""
    rng, held = np.random.default_rng(k), 0
    clusters = np.repeat(np.arange(k), 4)
    for _ in range(200):
        values = rng.normal(size=k)[clusters] + rng.normal(size=4 * k)
        low, high = t.interval(values.tolist(), clusters.tolist())
        held += low <= 0 <= high
    assert held / 200 > 0.91


changed = st.lists(
    st.tuples(st.sampled_from((-1.0, 0.0, 1.0, 0.25)), st.integers(0, 6)), min_size=1, max_size=30
)


@settings(deadline=None, max_examples=60)
@given(changed)
def test_the_paired_test_looks_at_every_pattern_of_signs(rows: list[tuple[float, int]]) -> None:
    changes, clusters = zip(*rows, strict=True)
    assert t.sign_flip(changes, clusters) == pytest.approx(slow.sign_flip(changes, clusters))


def test_few_changes_prove_nothing() -> None:
    for better, worse in ((4, 0), (5, 0), (6, 0), (9, 2), (3, 3)):
        changes = [1.0] * better + [-1.0] * worse + [0.0] * 40
        assert t.sign_flip(changes, range(len(changes))) == pytest.approx(
            slow.mcnemar(better, worse)
        )
    assert t.sign_flip([1.0] * 4, range(4)) == 0.125
    # Sixteen rows of two templates are two changes.
    assert t.sign_flip([1.0] * 16, [i % 2 for i in range(16)]) == 0.5


def test_many_changes_are_judged_by_random_patterns() -> None:
    changes = [1.0] * 14 + [-1.0] * 6
    exact = slow.mcnemar(14, 6)
    assert t.sign_flip(changes, range(20)) == pytest.approx(exact, abs=0.01)
    assert 0 < t.sign_flip([1.0] * 200, range(200)) < 1e-4
    many = [random.Random(i).choice((-1.0, 1.0)) for i in range(5000)]
    assert 0 < t.sign_flip(many, range(5000)) <= 1


def test_rows_that_share_either_key_are_one_cluster() -> None:
    assert t.merged(["a", "b", "c", "d"], [1, 1, 2, 2]) == [0, 0, 2, 2]
    assert len(set(t.merged(["a", "b", "a", "c"], [1, 2, 3, 2]))) == 2
    assert len(set(t.merged(["a", "b", "c"], [1, 2, 3], [1, 1, 1]))) == 1
