"""Random rows of different lengths, as lists for oracles and as padded tensors for us."""

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = st.floats(-3, 3, allow_nan=False, width=32)


def rows(values: int = 1) -> st.SearchStrategy[list[list[tuple[float, ...]]]]:
    """1 to 5 rows of 1 to 7 tokens, `values` floats a token."""
    token = st.tuples(*[FLOATS] * values)
    return st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=5)


def column(data: list[list[tuple[float, ...]]], i: int) -> list[list[float]]:
    return [[token[i] for token in row] for row in data]


def padded(data: list[list[float]]) -> tuple[Tensor, Tensor]:
    """[N, A] float64 and its mask. What stands in the padding is loud, for nothing may read it."""
    longest = max(map(len, data))
    values = torch.full((len(data), longest), 99.0, dtype=torch.float64)
    mask = torch.zeros(len(data), longest, dtype=torch.bool)
    for i, row in enumerate(data):
        values[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        mask[i, : len(row)] = True
    return values, mask


def assert_rows(
    ours: Tensor, mask: Tensor, expected: list[list[float]], atol: float = 1e-9
) -> None:
    flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
    assert torch.allclose(ours[mask], flat, atol=atol)
    assert (ours[~mask] == 0).all()
