"""Rows, whitening, and loss weights that do not care how a batch is split."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gearshift.algorithms.normalize import (
    loss_weights,
    pad_rows,
    row_mask,
    totals,
    whiten,
)
from tests.algorithms.ragged import assert_rows, column, flat, rows

settings.load_profile("algorithms")
COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


@given(COUNTS)
def test_padding_and_back(counts: list[int]) -> None:
    counts_N = torch.tensor(counts)
    values = torch.arange(1.0, 1 + sum(counts))
    rows = pad_rows(values, counts_N)
    assert rows.shape == (len(counts), max(counts))
    assert [[int(x) for x in row if x] for row in rows] == [
        list(range(1 + sum(counts[:i]), 1 + sum(counts[: i + 1]))) for i in range(len(counts))
    ]
    assert torch.equal(rows[row_mask(counts_N)], values)
    assert torch.equal(totals(values, counts_N), rows.sum(1))
    with pytest.raises(ValueError, match="do not fill"):
        pad_rows(torch.cat([values, values[:1]]), counts_N)


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
    values, counted, lengths = torch.randn(35).double() * 3 + 2, torch.rand(35) > 0.4, [7] * 5
    out = whiten(values, counted, torch.tensor(lengths))
    assert out[counted].mean().abs() < 1e-9
    assert out[counted].std(correction=0) == pytest.approx(1.0, abs=1e-6)
    assert (out[~counted] == 0).all()
    alone = whiten(torch.tensor([4.0, 9.0]), torch.tensor([True, False]), torch.tensor([2]))
    assert alone.tolist() == [0.0, 0.0]


@given(rows(1))
def test_whitening_by_definition(data: list) -> None:
    values, lengths = flat(column(data, 0))
    mean = statistics.fmean(values.tolist())
    scale = math.sqrt(statistics.pvariance(values.tolist()) + 0.1)
    expected = [[(x - mean) / scale for x in row] for row in column(data, 0)]
    every = torch.ones(len(values), dtype=torch.bool)
    assert_rows(whiten(values, every, lengths, eps=0.1), expected)


def test_nothing_counted_is_no_nan() -> None:
    none = torch.zeros(6, dtype=torch.bool)
    assert (whiten(torch.ones(6), none, torch.tensor([3, 3])) == 0).all()
    assert loss_weights(torch.tensor([0, 0]), "token_mean").shape == (0,)


def test_groups_are_whitened_by_themselves() -> None:
    lengths, group = torch.tensor([4, 1, 3, 2, 4]), torch.tensor([3, 1, 3, 1, 1])
    values, counted = torch.randn(14).double(), torch.rand(14) > 0.3
    out = whiten(values, counted, lengths, group)
    for g in (1, 3):
        own = torch.repeat_interleave(group == g, lengths)
        alone = whiten(values[own], counted[own], lengths[group == g])
        assert torch.allclose(out[own], alone)
    assert (out[~counted] == 0).all()
