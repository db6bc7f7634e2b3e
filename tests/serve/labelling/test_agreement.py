"""T-53: agreement against published examples, an oracle, and what must hold for any labels."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.serve.labelling.agreement import (
    alpha_interval,
    cohen_kappa,
    krippendorff_alpha,
    percent_agreement,
)
from tests.oracles import agreement as oracle

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), C: four observers, 12 units.
OBSERVERS = ("123321412...", "1233224125.3", ".3332342251.", "1233244125 1.".replace(" ", ""))
FOUR = [[int(o[i]) for o in OBSERVERS if o[i] != "."] for i in range(12)]
# The same, A and B: two observers, binary and nominal.
BINARY = [*zip((0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0), strict=True)]
LETTERS = [*zip("aabbdcccedda", "babbbccceddd", strict=True)]
# Cohen's kappa as most textbooks show it: 20 yes and yes, 5 and 10 mixed, 15 no and no.
YES_NO = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15

units = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=12)
both = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


def test_t53_published_examples() -> None:
    assert krippendorff_alpha(FOUR) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(FOUR, ordinal=True) == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(BINARY) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha(LETTERS) == pytest.approx(0.692, abs=5e-4)
    assert cohen_kappa(YES_NO) == pytest.approx(0.4)
    assert percent_agreement(YES_NO) == pytest.approx(0.7)


def test_t53_no_figure_where_there_is_none() -> None:
    for nothing in ([], [[1]], [[1, 1], [1, 1]]):
        assert krippendorff_alpha(nothing) is None
        assert alpha_interval(nothing) is None
    assert percent_agreement([[1]]) is None
    assert cohen_kappa([]) is None
    assert cohen_kappa([(1, 1)]) is None


@given(units, st.booleans())
def test_t53_alpha_is_the_oracle_s(labels: list[list[int]], ordinal: bool) -> None:
    assert krippendorff_alpha(labels, ordinal) == pytest.approx(
        oracle.krippendorff_alpha(labels, ordinal)
    )


@given(both)
def test_t53_kappa_is_the_oracle_s_and_the_same_both_ways(pairs: list[tuple[int, int]]) -> None:
    found = cohen_kappa(pairs)
    assert found == pytest.approx(oracle.cohen_kappa(pairs))
    assert found == pytest.approx(cohen_kappa([(b, a) for a, b in pairs]))


@given(units, st.randoms(use_true_random=False), st.booleans())
def test_t53_alpha_does_not_depend_on_order_nor_on_items_of_one_label(
    labels: list[list[int]], draw: random.Random, ordinal: bool
) -> None:
    other = [draw.sample(unit, len(unit)) for unit in draw.sample(labels, len(labels))]
    other += [[draw.randint(1, 5)] for _ in range(3)]
    assert krippendorff_alpha(other, ordinal) == pytest.approx(krippendorff_alpha(labels, ordinal))


@given(units, st.permutations(range(1, 6)))
def test_t53_names_mean_nothing_to_nominal_alpha(
    labels: list[list[int]], names: Sequence[int]
) -> None:
    other = [[names[value - 1] for value in unit] for unit in labels]
    assert krippendorff_alpha(other) == pytest.approx(krippendorff_alpha(labels))


@given(units)
def test_t53_alpha_is_one_only_for_full_agreement(labels: list[list[int]]) -> None:
    found = krippendorff_alpha(labels)
    if found is not None:
        assert found <= 1
        agreed = all(len(set(unit)) == 1 for unit in labels if unit)
        assert (found == pytest.approx(1)) == agreed


def test_t53_the_interval_holds_the_figure_and_narrows() -> None:
    few, many = alpha_interval(FOUR), alpha_interval(FOUR * 20)
    assert few and many
    alpha = krippendorff_alpha(FOUR)
    assert alpha and few[0] < alpha < few[1] <= 1
    assert many[1] - many[0] < (few[1] - few[0]) / 3
    assert few == alpha_interval(FOUR), "the same labels give the same interval"
