"""Rows, whitening, and loss weights that do not care how a batch is split."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.normalize import (
    loss_weights,
    masked_mean,
    moments,
    pad_rows,
    row_mask,
    unpad_rows,
    whiten,
    whiten_groups,
)
from tests.algorithms.ragged import assert_rows, column, padded, rows

settings.load_profile("algorithms")
COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


@given(COUNTS)
def test_padding_and_back(counts: list[int]) -> None:
    counts_N = torch.tensor(counts)
    flat = torch.arange(1.0, 1 + sum(counts))
    rows = pad_rows(flat, counts_N)
    assert rows.shape == (len(counts), max(counts))
    assert [[int(x) for x in row if x] for row in rows] == [
        list(range(1 + sum(counts[:i]), 1 + sum(counts[: i + 1]))) for i in range(len(counts))
    ]
    assert torch.equal(unpad_rows(rows, row_mask(counts_N)), flat)
    with pytest.raises(ValueError, match="do not fill"):
        pad_rows(torch.cat([flat, flat[:1]]), counts_N)


@given(COUNTS)
def test_loss_weights_by_definition(counts: list[int]) -> None:
    losses = [[float(7 * i + j) for j in range(c)] for i, c in enumerate(counts)]
    flat = torch.tensor([x for row in losses for x in row])
    full = [row for row in losses if row]
    wanted = {
        "token_mean": sum(map(sum, full)) / sum(map(len, full)),
        "sequence_mean": sum(sum(row) / len(row) for row in full) / len(full),
        "fixed_length": sum(map(sum, full)) / (len(full) * 9),
    }
    for mode, value in wanted.items():
        weights = loss_weights(torch.tensor(counts), mode, length=9)
        assert float((weights * flat).sum()) == pytest.approx(value, rel=1e-5)


def test_whitening() -> None:
    values, mask = torch.randn(5, 7).double() * 3 + 2, torch.rand(5, 7) > 0.4
    out = whiten(values, mask)
    assert out[mask].mean().abs() < 1e-9
    assert out[mask].std(correction=0) == pytest.approx(1.0, abs=1e-6)
    assert (out[~mask] == 0).all()
    kept = whiten(values, mask, shift_mean=False)
    assert torch.allclose(kept[mask].mean(), masked_mean(values, mask))
    alone = torch.tensor([[True, False]])
    assert whiten(torch.tensor([[4.0, 9.0]]), alone).tolist() == [[0.0, 0.0]]


@given(rows(1), st.booleans())
def test_whitening_by_definition(data: list, shift_mean: bool) -> None:
    values, mask = padded(column(data, 0))
    flat = [x for row in column(data, 0) for x in row]
    mean = statistics.fmean(flat)
    scale = math.sqrt(statistics.pvariance(flat) + 0.1)
    back = 0.0 if shift_mean else mean
    expected = [[(x - mean) / scale + back for x in row] for row in column(data, 0)]
    assert_rows(whiten(values, mask, shift_mean, 0.1), mask, expected)
    ours = whiten(values, mask, shift_mean, 0.1, moments(values, mask))
    assert_rows(ours, mask, expected)


def test_nothing_masked_is_no_nan() -> None:
    none = torch.zeros(2, 3, dtype=torch.bool)
    assert float(masked_mean(torch.ones(2, 3), none)) == 0.0
    assert (whiten(torch.ones(2, 3), none) == 0).all()
    assert loss_weights(torch.tensor([0, 0]), "token_mean").shape == (0,)


def test_ranks_that_add_up_their_moments_whiten_as_one() -> None:
    values, mask = torch.randn(6, 5).double() * 2 + 7, torch.rand(6, 5) > 0.3
    added = moments(values[:2], mask[:2]) + moments(values[2:], mask[2:])
    parts = [whiten(values[a:b], mask[a:b], moments=added) for a, b in ((0, 2), (2, 6))]
    assert torch.allclose(torch.cat(parts), whiten(values, mask), atol=1e-9)


def test_groups_are_whitened_by_themselves() -> None:
    values, mask = torch.randn(5, 4).double(), torch.rand(5, 4) > 0.3
    mask[:, 0] = True
    group = torch.tensor([3, 1, 3, 1, 1])
    out = whiten_groups(values, mask, group)
    for g in (1, 3):
        rows = group == g
        assert torch.allclose(out[rows], whiten(values[rows], mask[rows]))
    assert (out[~mask] == 0).all()
